"""Models and data of the configs that are no image classification, as a user's own modules hold them."""
