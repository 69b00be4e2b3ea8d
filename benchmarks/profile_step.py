"""Profile of our step with torch.profiler: shares of towers, loss, data, optimizer and communication.

python benchmarks/profile_step.py [--subject small --size 4096] writes benchmarks/results/profile_SUBJECT.json.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from measured import RESULTS, own_events, write
from subjects import Autocast, chunked, make_batch, make_towers
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile, record_function

from lib.gradcache.step import GradCache, cached_step
from lib.losses import LossShare, infonce

PARTS = ("towers, pass 1", "towers, pass 2 forward", "towers, pass 2 backward", "loss", "optimizer")


@dataclass(frozen=True)
class Settings:
    """The step to profile."""

    subject: str = "small"
    """A subject of benchmarks/subjects.py."""
    size: int = 4096
    """Effective batch."""
    chunk_size: int = 64
    """Pairs per forward."""
    output: Path | None = None
    """JSON file of the results; by default benchmarks/results/profile_SUBJECT.json."""


def main(settings: Settings) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    towers = _Told(make_towers(settings.subject, device), device)
    chunks = chunked(make_batch(settings.subject, settings.size), settings.chunk_size)
    optimizer = AdamW(towers.parameters(), lr=1e-4, fused=True)
    step = partial(one_step, towers, chunks, optimizer)
    step()
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as recorded, record_function("step"):
        step()
        if cuda:
            torch.cuda.synchronize()
    times = {event.key: total(event, device) for event in recorded.key_averages() if event.key in (*PARTS, "step")}
    shares = {part: times[part] / times["step"] for part in PARTS}
    shares["data, copies and the rest"] = 1 - sum(shares.values())
    kernels = sorted(own_events(recorded, device), key=lambda event: -own(event, device))[:8]
    content = {"subject": settings.subject, "effective_batch": settings.size, "chunk_size": settings.chunk_size}
    content |= {"shares": shares, "seconds": times["step"] / 1e6}
    content["largest"] = {event.key: own(event, device) / times["step"] for event in kernels if event.key not in times}
    write(settings.output or RESULTS / f"profile_{settings.subject}.json", device, content)
    for part, share in shares.items():
        print(f"{share:6.1%}  {part}")


def one_step(towers: "_Told", chunks: list, optimizer: AdamW) -> None:
    cached_step(GradCache(towers, towers.device, backward=told_backward), chunks, told_loss, None)
    with record_function("optimizer"):
        optimizer.step()
        optimizer.zero_grad()


def told_loss(*arguments: object) -> LossShare:
    with record_function("loss"):
        return infonce(*arguments)


def told_backward(surrogate: torch.Tensor) -> None:
    with record_function("towers, pass 2 backward"):
        surrogate.backward()


class _Told(Autocast):
    def forward(self, **inputs):
        with record_function("towers, pass 2 forward" if torch.is_grad_enabled() else "towers, pass 1"):
            return super().forward(**inputs)


def total(event, device: torch.device) -> float:
    return event.device_time_total if device.type == "cuda" else event.cpu_time_total


def own(event, device: torch.device) -> float:
    return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
