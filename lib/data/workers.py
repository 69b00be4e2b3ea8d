"""Data workers: how many fit into shared memory, how they start and end, and what is raised of one that is lost."""

import ctypes
import multiprocessing.queues
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from lib.distributed import local_ranks
from lib.errors import STOP_SIGNALS

_PR_SET_PDEATHSIG = 1
LARGEST_PART = 64
"""Pairs that a worker sends at a time: parts lie in shared memory, of which containers have little."""
SMALLEST_PART = 4
PARTS_A_WORKER = 2
"""Parts that each worker may have waiting in shared memory."""
SHARED_MEMORY = Path("/dev/shm")
_SHARE = 0.4  # of it: the workers of a validation take as much beside those of training


def workers_that_fit(workers: int, image_bytes: int) -> tuple[int, int]:
    """(workers, part_size) for the shared memory that is free, through which workers send their images.

    Parts become smaller first, and workers fewer only below `SMALLEST_PART` pairs; 0 workers where none fits.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return workers, LARGEST_PART
    shared = int(_SHARE * free_shared_memory()) // local_ranks()
    largest = shared // bytes_in_flight(workers, 1, image_bytes)
    if largest >= SMALLEST_PART:
        return workers, min(LARGEST_PART, largest)
    parts = shared // (SMALLEST_PART * image_bytes)
    return max(0, (parts - 1) // PARTS_A_WORKER), SMALLEST_PART


def shared_memory_for(workers: int, part_size: int, image_bytes: int) -> int:
    """Bytes that have to be free for so many workers on each rank to send parts of this size."""
    return int(bytes_in_flight(workers, part_size, image_bytes) * local_ranks() / _SHARE)


def free_shared_memory() -> int:
    """Bytes that are free in the memory through which workers send images."""
    return shutil.disk_usage(SHARED_MEMORY).free


def bytes_in_flight(workers: int, part_size: int, image_bytes: int) -> int:
    """Images in shared memory at once: those that the workers have waiting, and the part that is being cut."""
    return (PARTS_A_WORKER * workers + 1) * part_size * image_bytes


def end_workers(parts: Iterator) -> None:
    """End a DataLoader's workers, who ignore signals and whom the end of the process would wait for.

    To drop the iterator does not do: the traceback of an error that it raised holds it.
    """
    with suppress(RuntimeError):  # what torch's signal handler raises of a worker that was killed meanwhile
        getattr(parts, "_shutdown_workers", lambda: None)()
    for worker in getattr(parts, "_workers", ()):
        worker.kill()


def start_worker(_: int) -> None:
    """Make a DataLoader worker leave signals to the main process, end with it, and keep to one thread."""
    # A cluster signals every process of a job, and Ctrl-C every one of a terminal: the main process saves and
    # then stops the workers, so they must outlive the signal.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A rank that is killed must not live on in them: they hold its connections and the run folder's lock open.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The workers are the parallelism; a tokenizer's own threads do not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A part that does not fit into shared memory is printed and dropped by default, and waited for without end.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: BaseException, _: object) -> NoReturn:
    print(f"error: a data worker cannot send what it read: {error}", file=sys.stderr, flush=True)
    os._exit(1)
