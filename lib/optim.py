"""Optimizer and learning-rate schedule: which parameters decay, and how the rate moves."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices, which decay; norms, biases, scale and bias, which do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    spared = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, name: Literal["adamw", "sgd"], *, lr: float, weight_decay: float, beta2: float
) -> Optimizer:
    """AdamW (epsilon 1e-6, as in CLIP's paper, table 20), or SGD without momentum."""
    groups = parameter_groups(module, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), eps=1e-6)


def build_schedule(
    optimizer: Optimizer, name: Literal["cosine", "constant", "linear"], warmup_steps: int, steps: int
) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then constant, linear or cosine decay towards 0 after `steps`.

    transformers' factors count from 0, where warm-up is 0: they are read one step later, so that neither the first
    step nor the last is a whole batch encoded for no update.
    """
    kind = "constant_with_warmup" if name == "constant" else name
    published = get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps + 1)
    return LambdaLR(optimizer, [partial(_one_later, factor) for factor in published.lr_lambdas])


def _one_later(factor: Callable[[int], float], step: int) -> float:
    return factor(step + 1)
