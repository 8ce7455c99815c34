"""What surrounds a run's process: its fellows on other hosts, signals, hangs, compiled programs, a profile."""
