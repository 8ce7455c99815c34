"""Ahead-of-time compilation: what a run's programs need and cost on devices that are not here."""
