"""Process-level services: devices, multi-host setup, precision, signals, hangs, the compile cache, profiling."""
