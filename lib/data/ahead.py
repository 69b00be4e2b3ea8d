"""Owns the thread that collects what workers made while the main thread computes."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Item(Generic[T]):
    value: T


def ahead(items: Iterator[T], most: int) -> Iterator[T]:
    """The same items in the same order, taken from `items` by a thread that is at most `most` of them ahead.

    What `items` raises is raised here, after the items before it. Closing the generator ends the thread.
    """
    taken: queue.SimpleQueue[_Item[T] | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(most)
    closed = threading.Event()

    def take() -> None:
        try:
            for item in items:
                taken.put(_Item(item))
                room.acquire()
                if closed.is_set():
                    return
            taken.put(None)
        except BaseException as error:
            taken.put(error)

    thread = threading.Thread(target=take, name="chunks ahead", daemon=True)
    thread.start()
    try:
        while True:
            found = taken.get()
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            room.release()
            yield found.value
    finally:
        closed.set()
        room.release()
        thread.join()
