"""Contrastive losses in tiles, the positives of each anchor, and the memory bank (XBM)."""

from lib.losses.tiled import Loss, LossShare, Pairs, infonce, sigmoid

__all__ = ["Loss", "LossShare", "Pairs", "infonce", "sigmoid"]
