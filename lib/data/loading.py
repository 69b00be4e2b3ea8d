"""Loading beside computing: worker processes that decode, a thread that reads ahead, and the memory for its images."""

import ctypes
import mmap
import multiprocessing.queues
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from lib.distributed import local_ranks
from lib.errors import STOP_SIGNALS, RunError, raised_as

T = TypeVar("T")

LARGEST_PART = 64
"""Pairs that a worker sends at a time: parts lie in shared memory, of which containers have little."""
SMALLEST_PART = 4
PARTS_A_WORKER = 2
"""Parts that each worker may have waiting in shared memory."""
SHARED_MEMORY = Path("/dev/shm")

_SHARE = 0.4  # of shared memory: the workers of a validation need as much at the same time as those of training
_PR_SET_PDEATHSIG = 1
_NO_MEMORY = 2  # cudaErrorMemoryAllocation
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every CUDA context of the process


def workers_that_fit(workers: int, image_bytes: int) -> tuple[int, int]:
    """(workers, part_size) that fit into the free shared memory, through which workers send their images.

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
    """Bytes that have to be free for this number of workers on each rank to send parts of this size."""
    return int(bytes_in_flight(workers, part_size, image_bytes) * local_ranks() / _SHARE)


def free_shared_memory() -> int:
    """Free bytes of the memory through which workers send images."""
    return shutil.disk_usage(SHARED_MEMORY).free


def bytes_in_flight(workers: int, part_size: int, image_bytes: int) -> int:
    """Bytes of images in shared memory at once: the parts that wait, and the one from which chunks are cut."""
    return (PARTS_A_WORKER * workers + 1) * part_size * image_bytes


def start_worker(_: int) -> None:
    """Make a DataLoader worker leave signals to the main process, end with it, and keep to one thread."""
    # A cluster signals every process of a job, and Ctrl-C every one of a terminal: the main process saves and
    # then stops the workers, so they must outlive the signal.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Workers must not outlive a rank that is killed: they hold its connections and the run folder's lock open.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The workers are the parallelism; a tokenizer's own threads do not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # By default a part that does not fit into shared memory is printed and dropped, and the main process waits forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: BaseException, _: object) -> NoReturn:
    print(f"error: a data worker cannot send what it read: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def end_workers(parts: Iterator) -> None:
    """End a DataLoader's workers, which ignore signals and for which the end of the process would wait.

    Dropping the iterator is not enough: the traceback of an error that it raised holds it.
    """
    with suppress(RuntimeError):  # torch's signal handler raises it for a worker that was killed meanwhile
        getattr(parts, "_shutdown_workers", lambda: None)()
    for worker in getattr(parts, "_workers", ()):
        worker.kill()


class ImageBuffer:
    """Host memory for the images of some chunks: `slots` slots of `rows` images like `image`, used in turn.

    One allocation of the exact size: torch's allocator of page-locked memory rounds every chunk up to a power of two,
    1.74 times the size of 224-pixel images. pin: page-lock it, so that a GPU copies from it while both compute; call
    on the thread that chose the GPU.
    """

    def __init__(self, slots: int, rows: int, image: Tensor, pin: bool) -> None:
        self._bytes, self._registered = slots * rows * image.nbytes, False
        with raised_as(lambda _: self._too_large(), OSError):
            # Shared with processes that are forked later, which do not use it: after a fork, the first write to private
            # memory moves its page, while the GPU continues to copy from the old place.
            memory = mmap.mmap(-1, self._bytes)
        # A tensor for each slot: as views of one tensor, autograd would count filling one slot as changing all.
        size, shape = rows * image.numel(), (rows, *image.shape)
        offsets = (number * rows * image.nbytes for number in range(slots))
        self._slots = [torch.frombuffer(memory, dtype=image.dtype, count=size, offset=o).view(shape) for o in offsets]
        if pin:
            self._lock()

    def __getitem__(self, number: int) -> Tensor:
        """The slot of chunk `number`: (rows, *image.shape)."""
        return self._slots[number % len(self._slots)]

    def close(self) -> None:
        """Unlock the memory, once no copy from it is under way."""
        if self._registered:
            with suppress(RuntimeError):  # of a fault that is being reported already
                torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self._slots[0].data_ptr())
            self._registered = False

    def _too_large(self) -> RunError:
        return RunError(
            f"out of host memory: {self._bytes / 2**30:.1f} GiB for the images of a step and of what is read ahead; "
            "lower --effective-batch, or end what else takes the machine's memory",
            of_one_rank=True,
        )

    def _lock(self) -> None:
        done = int(torch.cuda.cudart().cudaHostRegister(self._slots[0].data_ptr(), self._bytes, _PORTABLE))
        self._registered = done == 0
        if not self._registered:
            # CUDA keeps this error for the next kernel, so a small one takes it.
            with suppress(RuntimeError):
                torch.zeros((), device="cuda")
            if done == _NO_MEMORY:
                raise self._too_large()
            # Some drivers do not lock memory that they did not allocate.
            self._slots = [slot.pin_memory() for slot in self._slots]


class ReadAhead(Generic[T]):
    """The items of an iterator, taken by a thread that holds at most `room` items which were not given back.

    An error of the iterator is raised here, after the items before it. closed: set by `close`, so that an iterator
    with slow items can end between them.
    """

    def __init__(self, items: Iterator[T], room: int, closed: threading.Event) -> None:
        self._items, self._taken = items, queue.SimpleQueue[tuple[T | None, BaseException | None]]()
        self._room, self._closed = threading.Semaphore(room), closed
        self._thread = threading.Thread(target=self._take, name="read ahead", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> int:
        """Number of items that wait."""
        return self._taken.qsize()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        assert not self._closed.is_set(), "a step is taken while its steps() is open"
        item, error = self._taken.get()
        if error is not None:
            raise error
        return item  # type: ignore[return-value]  # without an error there is an item

    def give_back(self, count: int) -> None:
        """Let the thread take `count` more items: the memory of as many is free again."""
        self._room.release(count)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._room.release()
        self._thread.join()

    def _take(self) -> None:
        while True:
            self._room.acquire()
            if self._closed.is_set():
                return
            try:
                self._taken.put((next(self._items), None))
            except BaseException as error:
                self._taken.put((None, error))
                return
