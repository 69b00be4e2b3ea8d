"""Seconds and peak memory of ways to do the same, side by side, and the files that keep them."""

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # for lib

Way = Callable[[], None]


def take_turns(ways: dict[str, Way], repeats: int, device: torch.device) -> dict[str, dict]:
    """Median seconds and peak bytes of each way; they take turns, so that what else the machine does meets all alike.

    Before, each runs once for what a first call allocates and compiles, and once for its memory; with a single repeat,
    once for its memory alone.
    """
    if repeats == 1:
        return {name: _once(way, device) for name, way in ways.items()}
    for way in ways.values():
        way()
    results = {name: {"peak_bytes": peak_bytes(way, device), "all_seconds": []} for name, way in ways.items()}
    for _ in range(repeats):
        for name, way in ways.items():
            results[name]["all_seconds"].append(seconds(way, device))
    for result in results.values():
        result["seconds"] = statistics.median(result["all_seconds"])
    return results


def _once(way: Way, device: torch.device) -> dict:
    memory, taken = peak_bytes(way, device), seconds(way, device)
    return {"peak_bytes": memory, "all_seconds": [taken], "seconds": taken}


def seconds(way: Way, device: torch.device) -> float:
    """Wall time of one call."""
    _wait(device)
    began = time.perf_counter()
    way()
    _wait(device)
    return time.perf_counter() - began


def peak_bytes(way: Way, device: torch.device) -> int:
    """Most memory that torch has allocated during one call, above what was held before: on a GPU there, else in RAM."""
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        way()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        way()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def write(file: Path, device: torch.device, content: dict) -> None:
    """One JSON file per benchmark and machine, read by tables.py."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(device)} | content, indent=1) + "\n")


def machine(device: torch.device) -> str:
    """What was measured on, for the tables."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__}"


def megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
