"""Exponential moving average of the weights as they train: evaluated and exported in their place on request."""

from itertools import chain, compress
from operator import not_

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lib.towers import TwoTowers


class WeightAverage(AveragedModel):
    """A copy of the towers that follows them by `decay`; its first update copies them.

    Batch-norm statistics are averaged too, because those of the last batches belong to other weights. Positions and
    counters are copied: the mean of equal integers, rounded down, can be one less.
    """

    module: TwoTowers

    def __init__(self, towers: TwoTowers, decay: float) -> None:
        super().__init__(towers, towers.logit_scale.device, use_buffers=True)
        self.decay = decay
        self.n_averaged = self.n_averaged.cpu()  # torch's own update waits for the device to read this count
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Follow the weights of `model`, the towers that were given, by one step."""
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        follows = [bool(self.n_averaged) and ours.is_floating_point() for ours, _ in pairs]
        if any(follows):
            averaged, current = zip(*compress(pairs, follows), strict=True)
            torch._foreach_lerp_(averaged, current, 1 - self.decay)
        if not all(follows):
            averaged, current = zip(*compress(pairs, map(not_, follows)), strict=True)
            torch._foreach_copy_(averaged, current)
        self.n_averaged += 1


def _tensors(model: nn.Module) -> chain[torch.Tensor]:
    return chain(model.parameters(), model.buffers())
