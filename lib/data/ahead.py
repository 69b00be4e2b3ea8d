"""Reading ahead: the host memory for the images of a step, and the thread that fills it."""

import mmap
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from lib.errors import RunError, raised_as

T = TypeVar("T")
_NO_MEMORY = 2  # cudaErrorMemoryAllocation
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every CUDA context of the process


class ImageBuffer:
    """Host memory for the images of some chunks: `slots` slots of `rows` images like `image`, used in turn.

    One allocation of the exact size: torch's allocator of page-locked memory rounds every chunk up to a power of two,
    1.74 times what 224-pixel images take. pin: page-lock it, so that a GPU copies from it while both compute; made on
    the thread that chose the GPU.
    """

    def __init__(self, slots: int, rows: int, image: Tensor, pin: bool) -> None:
        self._bytes, self._registered = slots * rows * image.nbytes, False
        with raised_as(lambda _: self._too_large(), OSError):
            # Shared with processes that are forked later, which do not use it: the first write to private memory after
            # a fork moves its page away from where the GPU was told that it is, so that old images would be copied.
            memory = mmap.mmap(-1, self._bytes)
        # A tensor for each slot: autograd would take the filling of one for a change of all that are views of one.
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
            # CUDA keeps this error for the next kernel.
            with suppress(RuntimeError):
                torch.zeros((), device="cuda")
            if done == _NO_MEMORY:
                raise self._too_large()
            # Some drivers do not lock memory that they did not allocate.
            self._slots = [slot.pin_memory() for slot in self._slots]


@dataclass(frozen=True)
class _Taken(Generic[T]):
    item: T | None = None
    error: BaseException | None = None


class ReadAhead(Generic[T]):
    """The items of an iterator, taken by a thread that holds at most `room` items which were not given back.

    What the iterator raises is raised here, after the items before it. closed: set by `close`, so that an iterator
    whose items take long can end between them.
    """

    def __init__(self, items: Iterator[T], room: int, closed: threading.Event) -> None:
        self._items, self._taken = items, queue.SimpleQueue[_Taken[T]]()
        self._room, self._closed = threading.Semaphore(room), closed
        self._thread = threading.Thread(target=self._take, name="read ahead", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> int:
        """Items that wait."""
        return self._taken.qsize()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        assert not self._closed.is_set(), "a step is taken while its steps() is open"
        taken = self._taken.get()
        if taken.error is not None:
            raise taken.error
        return cast(T, taken.item)

    def give_back(self, count: int) -> None:
        """Let the thread take `count` more: what as many items lie in is free again."""
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
                item = next(self._items)
            except BaseException as error:
                self._taken.put(_Taken(error=error))
                return
            self._taken.put(_Taken(item))
