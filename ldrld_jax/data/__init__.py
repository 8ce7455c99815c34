"""Data: sources of records, image augmentation, and the loaders that make batches."""
