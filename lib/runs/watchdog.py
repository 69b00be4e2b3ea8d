"""A rank that dies or freezes takes the job down within a minute, whatever launched it and on whatever network."""

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from lib.distributed import rank_and_world_size
from lib.errors import StoppedEarly

SECONDS_TO_FAIL = 15.0  # from an error to the end of the process


class Watchdog:
    """Each rank writes a heartbeat to the shared store and watches its neighbour's, in a thread.

    A collective whose peer is gone may wait for its timeout, 10 to 30 minutes. Here the ranks form a ring: a rank that
    sees no heartbeat of the next one for `limit` seconds notes it in the store, and every process exits with code 1.
    The store ends with the launcher or rank 0; its loss ends the processes too, so that none trains on as an orphan.
    """

    def __init__(self, beat: float = 5.0, limit: float = 40.0) -> None:
        self._beat, self._limit = beat, limit
        self._rank, self._world_size = rank_and_world_size()
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._world_size > 1:
            # A connection of its own: the main thread may wait on its own one for long.
            self._store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=self._limit),
            )
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        if failure and self._world_size > 1:  # the end of a process may wait too, for a worker or a connection
            code = 75 if issubclass(failure, StoppedEarly) else 1
            timer = threading.Timer(min(SECONDS_TO_FAIL, self._limit), os._exit, [code])
            timer.daemon = True
            timer.start()

    def _watch(self) -> None:
        neighbour = (self._rank + 1) % self._world_size
        heard, heard_at, count = "", time.monotonic(), 0
        while not self._ended.wait(self._beat):
            count += 1
            try:
                self._store.set(_alive(self._rank), str(count))
                if self._store.check([_LOST]):
                    self._end(self._store.get(_LOST).decode())
                said = self._store.get(_alive(neighbour)).decode() if self._store.check([_alive(neighbour)]) else ""
                if said != heard:
                    heard, heard_at = said, time.monotonic()
                elif time.monotonic() - heard_at > self._limit:
                    lost = f"rank {neighbour} has not been heard of for {self._limit:.0f} s"
                    self._store.set(_LOST, lost)
                    self._end(lost)
            except (RuntimeError, OSError):  # of all kinds that a store raises
                self._end("the launcher, or rank 0, is gone: its store does not answer")

    def _end(self, reason: str) -> None:
        """End the process, unless it is at its own end: then others may be gone already."""
        if not self._ended.wait(2 * self._beat):
            print(f"error: rank {self._rank}: {reason}; --resume auto resumes", file=sys.stderr, flush=True)
            os._exit(1)


_LOST = "watchdog/lost"


def _alive(rank: int) -> str:
    return f"watchdog/{rank}"
