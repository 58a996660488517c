"""Files that are there whole or not at all, and whether there is room for them."""
