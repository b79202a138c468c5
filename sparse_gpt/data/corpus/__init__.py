"""Text comes in: which files there are, how they are cut into slices, and the documents in them."""
