"""Retrieval: how high the right caption of an image, and the right image of a caption, is ranked."""
