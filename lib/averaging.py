"""The exponential moving average of the weights as they train: evaluated and exported instead of them on request."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lib.towers import TwoTowers

_Tensors = tuple[Tensor, ...] | list[Tensor]


class WeightAverage(AveragedModel):
    """A copy of the towers that follows them by `decay`; its first update copies them.

    Batch-norm statistics are averaged too: those of the last batches belong to other weights.
    """

    module: TwoTowers

    def __init__(self, towers: TwoTowers, decay: float) -> None:
        device = towers.logit_scale.device
        super().__init__(towers, device, multi_avg_fn=_averaging(decay), use_buffers=True)
        self.requires_grad_(False).eval()


def _averaging(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    floating = get_ema_multi_avg_fn(decay)

    def update(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            floating(averaged, current, count)
        else:  # positions and counters: the mean of equal integers, rounded down, can be one less
            torch._foreach_copy_(averaged, current)

    return update
