"""How good a model is and how far to trust it: one pass over the data, figures, and a page."""
