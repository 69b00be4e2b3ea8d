"""Contrastive losses in tiles, the positives of each anchor, and the memory bank (XBM)."""

from lib.losses.infonce import infonce
from lib.losses.positives import Pairs
from lib.losses.sigmoid import sigmoid
from lib.losses.tiles import Loss, LossShare

__all__ = ["Loss", "LossShare", "Pairs", "infonce", "sigmoid"]
