"""A trained student out in the world: `--mode export` and `--mode predict`."""
