"""Probe: how well classifiers read the classes out of frozen image embeddings, with all labels and with a few."""
