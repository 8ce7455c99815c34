"""Checkpoints: written in the background, kept by policy, told from damaged ones, restored on any devices."""
