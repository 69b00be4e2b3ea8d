"""Owns the thread that collects what workers made while the main thread computes."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], most: int) -> Iterator[T]:
    """The same items in the same order, taken from `items` by a thread that is at most `most` of them ahead.

    What `items` raises is raised here, after the items before it. Closing the generator ends the thread.
    """
    taken: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(most)
    closed = threading.Event()

    def take() -> None:
        try:
            for item in items:
                taken.put(("item", item))
                room.acquire()
                if closed.is_set():
                    return
            taken.put(("end", None))
        except BaseException as error:
            taken.put(("error", error))

    thread = threading.Thread(target=take, name="chunks ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = taken.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            room.release()
            yield item
    finally:
        closed.set()
        room.release()
        thread.join()
