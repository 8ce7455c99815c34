"""How fast a config trains on this machine, and where the time goes: `--mode bench`."""
