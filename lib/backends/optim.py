"""Optimizer, learning-rate schedule and weight average: rates and decay by parameter, and how the rates move."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from operator import not_
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from transformers import get_scheduler

from lib.errors import InputError
from lib.towers import TwoTowers
from lib.towers.tower import is_frozen
from lib.towers.trainable import blocks, depths


@dataclass(frozen=True)
class Rates:
    """Peak learning rates by part; None is that of `lr`, which scale and bias have too.

    layer_decay: factor from each block of a trunk to the one below, the last block's own being layer_decay, and the
        embeddings' the lowest (Bao et al. 2021, arXiv:2106.08254, BEiT's fine-tuning); 1: none.
    """

    lr: float
    image_trunk: float | None = None
    text_trunk: float | None = None
    heads: float | None = None
    layer_decay: float = 1.0


def parameter_groups(towers: TwoTowers, rates: Rates, weight_decay: float) -> list[dict]:
    """Trainable parameters in groups of one rate and decay: matrices decay; norms, biases, scale and bias do not."""
    rate_of = _rates_of_parameters(towers, rates)
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in towers.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((rate_of.get(name, rates.lr), decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def _rates_of_parameters(towers: TwoTowers, rates: Rates) -> dict[str, float]:
    """Peak rates of the trunks' and heads' parameters, by name."""
    rate_of = {}
    sides = ("image", towers.image, rates.image_trunk), ("text", towers.text, rates.text_trunk)
    for tower, side, own in sides:
        trunk, trunk_rate = side.trunk, rates.lr if own is None else own
        count = len(blocks(trunk))
        if rates.layer_decay != 1 and not count and not is_frozen(trunk):
            raise InputError(
                f"--layer-decay {rates.layer_decay}: the blocks of a {type(trunk).__name__} are not known; leave it "
                f"out, or --freeze {tower}.trunk"
            )
        for name, depth in depths(trunk).items():
            steps_below_top = count + 1 - depth if count else 0
            rate_of[f"{tower}.trunk.{name}"] = trunk_rate * rates.layer_decay**steps_below_top
        for name, _ in side.head.named_parameters():
            rate_of[f"{tower}.head.{name}"] = rates.lr if rates.heads is None else rates.heads
    return rate_of


def build_optimizer(
    towers: TwoTowers,
    name: Literal["adamw", "adam", "sgd"],
    *,
    rates: Rates,
    weight_decay: float,
    beta2: float,
    fused: bool = False,
) -> Optimizer:
    """AdamW (epsilon 1e-6, as in CLIP's paper, table 20), Adam (decay as a part of the gradient), or plain SGD.

    fused: one kernel for all parameters. Not with a gradient scaler, which could not notice that a step was skipped.
    """
    groups = parameter_groups(towers, rates, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rates.lr)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(groups, lr=rates.lr, betas=(0.9, beta2), eps=1e-6, fused=fused)


def moments_by_name(optimizer: Optimizer, towers: TwoTowers) -> dict[str, dict]:
    """The optimizer's state of each parameter, by name: the groups, which depend on the rates, do not matter."""
    return {name: optimizer.state[p] for name, p in towers.named_parameters() if p in optimizer.state}


def load_moments(optimizer: Optimizer, towers: TwoTowers, moments: dict[str, dict]) -> None:
    """Restore the result of `moments_by_name`; rates and decay stay those that the optimizer was built with."""
    name_of = {id(parameter): name for name, parameter in towers.named_parameters()}
    order = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: moments[name] for index, name in enumerate(order) if name in moments}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def build_schedule(
    optimizer: Optimizer, name: Literal["cosine", "constant", "linear"], warmup_steps: int, steps: int
) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then constant, linear or cosine decay towards 0 after `steps`.

    All groups move alike, each to its own peak. transformers' factors count from 0, where warm-up is 0: they are read
    one step later, so that neither the first step nor the last is a whole batch encoded for no update.
    """
    kind = "constant_with_warmup" if name == "constant" else name
    published = get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps + 1)
    return LambdaLR(optimizer, [partial(_one_later, factor) for factor in published.lr_lambdas])


def scheduled_scale(first_and_last: tuple[float, float], step: int, steps: int) -> float:
    """The logit scale of a step, counted from 1: in equal ratios from the first step's to the last's."""
    first, last = first_and_last
    return first * (last / first) ** ((step - 1) / max(steps - 1, 1))


def move_schedule(schedule: LambdaLR, updates: int) -> None:
    """Set the schedule to its state after this many updates, each group from its own peak."""
    schedule.last_epoch = updates
    groups = schedule.optimizer.param_groups
    for group, peak, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = peak * factor(updates)


def _one_later(factor: Callable[[int], float], step: int) -> float:
    return factor(step + 1)


class WeightAverage(AveragedModel):
    """Exponential moving average of the weights: a copy of the towers that follows by `decay`; the first update copies.

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
