"""Captioned images: the readers of every file format, one listing, training pairs and evaluation sets of it."""
