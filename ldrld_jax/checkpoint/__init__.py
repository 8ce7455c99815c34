"""Checkpoints: written in the background, kept by a policy, checked for damage, restored on any devices."""
