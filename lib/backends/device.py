"""Resources of this process: cores, memory that is free or was used, and errors of memory."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import joblib
import psutil
import torch

from lib.distributed import local_ranks
from lib.errors import RunError

# torch hides why each of cuDNN's algorithms failed: "unable to find an engine" remains where none had memory.
# cuBLAS cannot even start on a full card.
_NO_MEMORY = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_ALLOC_FAILED"
    r"|DEVICE_ALLOCATION_FAILED|HOST_ALLOCATION_FAILED|unable to find an engine to execute"
    r"|can't allocate memory|cannot allocate memory",
    re.IGNORECASE,
)
MEMBERSHIPS, CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_NO_SUCH_KERNEL = "does not have a deterministic implementation"
_AMOUNT = re.compile(r"[Tt]ried to allocate ([\d.]+ [KMGT]?i?B|\d+ bytes)")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the accelerator, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every platform

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Peak memory that torch's allocator took from the accelerator, in use or not; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def free_memory(device: torch.device) -> int:
    """Bytes free on the device now (on a CPU: available in the machine)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [limit - used for limit, used in _container_memory()]
    return max(0, min([psutil.virtual_memory().available, *limits]))


def total_memory(device: torch.device) -> int:
    """Bytes that the device has, in use or not (on a CPU: of the machine)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _container_memory())])


def _container_memory() -> Iterator[tuple[int, int]]:
    """(limit, bytes used that cannot be freed at once) of every control group that holds this process, on Linux."""
    try:
        memberships = MEMBERSHIPS.read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, name = membership.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CONTROL_GROUPS / controllers
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # the root has no limit, "max" is none
                limit, used = (int((folder / file).read_text()) for file in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit, used - int(stat.get(names[2], 0))
            if folder == root:
                break


def is_out_of_memory(error: BaseException) -> bool:
    """The error is a failed allocation: torch's, that of cuBLAS or cuDNN for their work space, or the host's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


@contextmanager
def device_faults_reported(chunk_pairs: int | None) -> Iterator[None]:
    """Turn a failed allocation into a RunError that names the amount, the chunk and the remedy.

    The same for a kernel that --deterministic forbids. chunk_pairs: None before chunks are known, when weights and
    stores alone need the memory.
    """
    try:
        yield
    except RunError:
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        if _NO_SUCH_KERNEL in str(error):
            kernel = str(error).split(_NO_SUCH_KERNEL)[0].strip()
            raise RunError(
                f"--deterministic: {kernel} has no reproducible kernel on this device; leave it out"
            ) from error
        if not is_out_of_memory(error):
            raise
        amount = _AMOUNT.search(str(error))
        asked = f"{amount[1]} more were asked for" if amount else "an allocation failed"
        if chunk_pairs is None:
            chunks, remedy = "before the first chunk", "end other processes on this device, or use a smaller model"
        else:
            chunks = f"with chunks of {chunk_pairs} pairs"
            remedy = f"use --chunk-size {chunk_pairs // 2}" if chunk_pairs > 1 else "use --gradient-checkpointing"
        raise RunError(f"out of memory {chunks} ({asked}): {remedy}", of_one_rank=True) from error


@contextmanager
def fork_rng(device: torch.device) -> Iterator[None]:
    """Leave the generators of the CPU and of this device as they were; without a list torch warns of many GPUs."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield


def use_all_cores() -> None:
    """Share the cores over the ranks where accelerate launch or torchrun set OMP_NUM_THREADS=1 by default."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, usable_cores() // local_ranks()))


def usable_cores() -> int:
    """Cores that this process may use, within its affinity and its container's CPU quota."""
    return joblib.cpu_count()


def auto_workers() -> int:
    """Processes that decode for one rank: its share of the usable cores but one, which launches the kernels."""
    return max(1, usable_cores() // local_ranks() - 1)
