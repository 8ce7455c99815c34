"""Deployment of a trained student: `--mode export` and `--mode predict`."""
