"""What the plan foretells of a step, its seconds and peak memory, and how far off that was."""

import statistics
from dataclasses import dataclass

import psutil
import torch

from lib.backends import peak_memory_bytes
from lib.collectives import gather_objects
from lib.losses import Loss
from lib.plan import gigabytes
from lib.probe import measure_loss, spread
from lib.report import read_metrics
from lib.run import Run

LEAST_STEPS = 2  # the first step of a process compiles kernels and fills caches


@dataclass(frozen=True)
class Prediction:
    """Of one rank; communication and waiting for data are not in it."""

    step_seconds: float
    peak_memory_bytes: int
    """On the accelerator; on a CPU what the process holds in all."""
    host_memory_bytes: int
    """What the process holds in the machine's memory."""

    def lines(self) -> list[str]:
        """For the start-up plan."""
        same = self.peak_memory_bytes == self.host_memory_bytes
        device = "" if same else f"{gigabytes(self.peak_memory_bytes)} on the device and "
        return [
            f"step       about {self.step_seconds:.3g} s without waiting for data or other ranks; at its peak {device}"
            f"{gigabytes(self.host_memory_bytes)} on the host, for each rank"
        ]


def predict(run: Run, loss: Loss) -> Prediction:
    """Foretell a step from what the towers and the loss took on a few pairs; all ranks call it."""
    plan, device = run.plan, run.accelerator.device
    texts = spread(run.source.distinct_texts, plan.per_rank) if run.share_texts else float(plan.per_rank)
    seconds = run.costs.seconds(plan.per_rank, texts, min(1.0, plan.keep_graphs / plan.chunks))
    candidates = plan.effective_batch + plan.xbm_size
    seconds += measure_loss(loss, plan.embed_dim, plan.per_rank, candidates, device)
    images = plan.pixel_bytes + (min(plan.pixel_bytes, 2**31) if run.workers else 0)  # the next step's may wait
    host = psutil.Process().memory_info().rss + images
    if device.type == "cpu":
        host += plan.device_bytes - sum(parameter.nbytes for parameter in run.towers.parameters())
    return Prediction(seconds, host if device.type == "cpu" else plan.device_bytes, host)


def compared(run: Run, prediction: Prediction) -> dict[str, dict[str, float]]:
    """{"step_seconds", ...: {"predicted", "measured", "off"}}; off is measured / predicted - 1. All ranks call it.

    Seconds only after some steps of this process; they are the median's, without the wait for data.
    """
    measured = {
        "peak_memory_bytes": max(gather_objects(peak_memory_bytes(run.accelerator.device))),
        "host_memory_bytes": max(gather_objects(peak_memory_bytes(torch.device("cpu")))),
    }
    lines = [line for line in read_metrics(run.folder) if "loss" in line and line["step"] > run.first_step]
    seconds = [line["step_seconds"] - line["data_seconds"] for line in lines]
    if len(seconds) >= LEAST_STEPS:
        measured = {"step_seconds": statistics.median(seconds[1:])} | measured
    predicted = vars(prediction)
    return {
        name: {"predicted": predicted[name], "measured": value, "off": value / predicted[name] - 1}
        for name, value in measured.items()
    }


def told(comparison: dict[str, dict[str, float]]) -> str:
    """One line: how far off the plan was."""
    words = {"step_seconds": "seconds a step", "peak_memory_bytes": "peak memory", "host_memory_bytes": "host memory"}
    parts = []
    for name, numbers in comparison.items():
        show = "{:.3g}".format if name == "step_seconds" else lambda value: gigabytes(int(value))
        measured, predicted = show(numbers["measured"]), show(numbers["predicted"])
        parts.append(f"{words[name]} {measured} (the plan's {predicted}, {numbers['off']:+.0%})")
    return "measured: " + ", ".join(parts)
