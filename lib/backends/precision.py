"""The towers' precision, the same on every backend: chosen for the device, autocast, TF32, and fp16's loss scale."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.utils.deterministic
from torch import nn

from lib.config.flags import PrecisionFlag
from lib.errors import InputError

PrecisionName = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # where `accelerate launch --mixed_precision` leaves its value


@dataclass(frozen=True)
class Precision:
    """The number format in which the towers compute; their weights, gradients and embeddings stay float32."""

    name: PrecisionName
    device: torch.device
    reason: str = ""
    """Why this one was chosen, for the start-up plan."""

    def autocast(self) -> torch.autocast | nullcontext:
        """A context in which the towers compute in this precision."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.name])

    def wrap(self, towers: nn.Module) -> None:
        """Let every forward of `towers` run in this precision, whatever wraps them later.

        `forward` becomes an attribute of the instance: copy the towers before, or take it off first.
        """
        autocast = self.autocast()
        if isinstance(autocast, torch.autocast):
            towers.forward = autocast(towers.forward)

    def identity(self) -> tuple[str, ...]:
        """Name the precision for stored embeddings, which depend on it; empty in float32 on a CPU, the reference."""
        return () if (self.name, self.device.type) == ("fp32", "cpu") else (self.name, self.device.type)

    def __str__(self) -> str:
        """Name and reason: `bf16 (auto: this device computes in it)`."""
        return f"{self.name} ({self.reason.removeprefix('; ')})" if self.reason else self.name


def choose_precision(asked: PrecisionFlag, device: torch.device) -> Precision:
    """Choose by --precision and `accelerate launch --mixed_precision`, or by the device.

    `accelerate launch` exports "no" by default, so "no" is no choice. Raises InputError for a value
    that is not supported, and for a flag that contradicts the launcher.
    """
    launched = os.environ.get(LAUNCHED, "no")
    if launched not in ("no", *PRECISIONS):
        raise InputError(f"--mixed_precision {launched} is not supported; use bf16, fp16 or no")
    if launched == "no":
        return _suiting(device) if asked == "auto" else Precision(asked, device, _emulated(asked, device))
    if asked not in ("auto", launched):
        raise InputError(
            f"--precision {asked} contradicts {launched} of accelerate launch (--mixed_precision, its configuration "
            f"file or {LAUNCHED}); leave one of them out"
        )
    name = next(known for known in PRECISIONS if known == launched)
    return Precision(name, device, "from accelerate launch" + _emulated(name, device))


def _suiting(device: torch.device) -> Precision:
    """bf16 where the device computes in it, fp16 on older CUDA cards, else fp32."""
    if device.type == "cpu":
        return Precision("fp32", device, "auto: on a CPU")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", device, "auto: this GPU computes in it")
        return Precision("fp16", device, "auto: this GPU does not compute in bf16")
    asks = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if asks is not None and asks():
        return Precision("bf16", device, f"auto: this {device.type} computes in it")
    return Precision("fp32", device, f"auto: nothing shorter is known to work on {device.type}")


def _emulated(name: PrecisionName, device: torch.device) -> str:
    slow = name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "; this GPU only emulates it: fp16 is faster" if slow else ""


def set_up_kernels(device: torch.device, deterministic: bool) -> None:
    """Choose CUDA's kernels for the process: TF32 for float32 products, the fastest convolutions, or reproducible ones.

    deterministic: --deterministic, which also holds on a CPU. Without it weight gradients of convolutions, the backward
    pass of attention and index_add_ add in an order of their own on CUDA. Called before the device is first used.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory before it is written. (A property of the module, unknown to torch's own types.)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products of float32 in all 24 bits: for losses and for comparisons of gradients.

    TF32 rounds their inputs to 11 bits. At N = 8,192 and scale 100 the gradients of a trained model are then off by
    0.8% (docs/results.md), above the 0.1% that mixed precision may cost.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class LossScale:
    """Factor of an fp16 loss, so that small gradients do not vanish (Micikevicius et al. 2018, arXiv:1710.03740).

    Halved after an overflow, doubled after 2000 updates without one, as by torch's GradScaler; but the norm over all
    ranks decides, which is the same on every rank of every backend.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self) -> None:
        self.value, self._good = 2.0**16, 0

    def update(self, finite: bool) -> None:
        """Adapt to an update that was done (finite), or that an overflow prevented."""
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self._good == self.GROWTH_INTERVAL:
            self.value, self._good = self.value * 2, 0

    def state_dict(self) -> dict[str, float]:
        """With the keys of GradScaler."""
        return {"scale": self.value, "_growth_tracker": self._good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self._good = state["scale"], int(state["_growth_tracker"])
