"""Ahead-of-time compilation: memory, time and traffic of a run's programs on devices that are not present."""
