"""A run's record: what it writes, what a person sees, and how it is read again."""
