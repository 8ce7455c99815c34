"""Stages and helper modules of `benchmarks/accelerator.py`."""
