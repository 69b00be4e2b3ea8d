"""Seconds and peak memory of several ways to do the same work, measured alternately, and the files of the results."""

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # for lib

from lib.backends.device import is_out_of_memory  # noqa: E402

Way = Callable[[], None]


def take_turns(ways: dict[str, Way], repeats: int, device: torch.device) -> dict[str, dict]:
    """Median seconds and peak bytes of each way; they alternate, so that other load on the machine affects all equally.

    Each runs once before as a warm-up, which allocates and compiles. A way that runs out of memory has
    "out_of_memory" as its result, and the others continue.
    """
    results: dict[str, dict] = {name: {"all_seconds": []} for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            result = results[name]
            if "out_of_memory" in result:
                continue
            try:
                found = once(way, device) if turn else first(way, device, warm=repeats > 1)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                results[name] = {"out_of_memory": str(error).split(" GPU ")[0]}
                continue
            result["all_seconds"] += [found.pop("seconds")] if turn else []
            found.pop("peak_reserved_bytes", None)  # torch's allocator still holds memory of the ways before
            result |= found
    for result in results.values():
        if "all_seconds" in result:
            result["seconds"] = statistics.median(result["all_seconds"])
    return results


def first(way: Way, device: torch.device, warm: bool) -> dict:
    """Warm up; on a CPU this call also measures memory, with a profiler that would slow down a timed call."""
    gc.collect()
    if warm:
        way()
    return {"peak_bytes": _peak_on_cpu(way)} if device.type == "cpu" else {}


def once(way: Way, device: torch.device) -> dict:
    """Seconds of one call; on a GPU by CUDA events, with the memory of the same call.

    peak_bytes: peak of torch's allocations during the call, above those before it; peak_allocated_bytes: the whole
    peak; peak_reserved_bytes: with the memory that torch's allocator reserved.
    """
    gc.collect()
    if device.type == "cuda":
        return _once_on_cuda(way, device)
    began = time.perf_counter()
    way()
    return {"seconds": time.perf_counter() - began}


def _once_on_cuda(way: Way, device: torch.device) -> dict:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    way()
    ended.record()
    ended.synchronize()
    return {
        "seconds": began.elapsed_time(ended) / 1000,
        "peak_bytes": torch.cuda.max_memory_allocated(device) - before,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _peak_on_cpu(way: Way) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        way()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def own_events(recorded: profile, device: torch.device) -> list:
    """Events of the device, averaged by name: on a GPU the kernels, because operations contain their time too."""
    events = recorded.key_averages()
    if device.type == "cpu":
        return list(events)
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product: bfloat16 on an accelerator, float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    result = take_turns({"product": partial(torch.mm, left, right)}, 5, device)
    return 2 * side**3 / min(result["product"]["all_seconds"])


def write(file: Path, device: torch.device, content: dict) -> None:
    """Write one JSON file per benchmark and machine, which tables.py reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(device)} | content, indent=1) + "\n")


def machine(device: torch.device) -> str:
    """The machine, for the tables."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__}"


def megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
