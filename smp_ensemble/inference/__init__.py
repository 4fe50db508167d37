"""From images to masks, fast."""
