"""Training benchmarks of a config on this machine: `--mode bench`."""
