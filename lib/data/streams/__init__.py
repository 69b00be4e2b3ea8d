"""Endless streams of pairs from shards and mixtures: dealing, shuffling, exact positions."""
