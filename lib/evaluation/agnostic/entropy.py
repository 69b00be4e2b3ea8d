"""The distribution of an image over prompts at a temperature, and how undecided it is."""

import math

import torch
from torch import Tensor


def prompt_shares(similarities: Tensor, temperature: float) -> Tensor:
    """Softmax over the prompts of similarity / temperature: (n, K) -> (n, K) float64, rows sum to 1."""
    return (similarities.double() / temperature).softmax(dim=1)


def entropies(shares: Tensor) -> Tensor:
    """Entropy in nats of each row of shares: (n, K) -> (n,), from 0 (one prompt has all) to log K (all alike)."""
    # entr(0) is 0; a sum may exceed log K by its rounding.
    return torch.special.entr(shares).sum(dim=1).clamp(0.0, math.log(shares.shape[1]))
