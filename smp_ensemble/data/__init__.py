"""What goes in: data sets, splits, transforms."""
