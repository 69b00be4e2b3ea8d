"""Mixed precision, the same on every backend: autocast within the towers' forward, and a loss scale for fp16."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

PrecisionName = Literal["no", "bf16", "fp16"]
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """What the towers compute in; their weights stay float32."""

    name: PrecisionName
    device: torch.device

    def autocast(self) -> torch.autocast | nullcontext:
        """A context in which the towers compute in this precision."""
        if self.name == "no":
            return nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.name])

    def wrap(self, towers: nn.Module) -> None:
        """Let every forward of `towers` run in this precision, whatever wraps them later.

        `forward` becomes an attribute of the instance: copy the towers before, or take it off first.
        """
        autocast = self.autocast()
        if isinstance(autocast, torch.autocast):
            towers.forward = autocast(towers.forward)


class LossScale:
    """What an fp16 loss is multiplied with, so that small gradients do not vanish (Micikevicius et al. 2018).

    Halved after an overflow, doubled after 2000 updates without one, as torch's GradScaler does; unlike it, it looks at
    the norm over all ranks, which the ranks of every backend have in common.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self) -> None:
        self.value, self._good = 2.0**16, 0

    def update(self, finite: bool) -> None:
        """Take note of an update that was done, or that an overflow prevented."""
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self._good == self.GROWTH_INTERVAL:
            self.value, self._good = self.value * 2, 0

    def state_dict(self) -> dict[str, float]:
        """By the names that GradScaler has for them."""
        return {"scale": self.value, "_growth_tracker": self._good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self._good = state["scale"], int(state["_growth_tracker"])
