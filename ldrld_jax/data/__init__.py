"""Data: a source of records, what is done to an image, and the loaders that make batches of both."""
