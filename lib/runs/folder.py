"""The run's folder: chosen by rank 0 for all, and locked against a second job before it is looked into."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lib.config import TrainConfig
from lib.distributed import decided_by_rank_0
from lib.errors import InputError, raised_as
from lib.files import fault_of, write_text
from lib.runs.reporter import METRICS

LOCK, HOLDER = ".lock", ".lock_holder.json"
SECONDS_FOR_THE_LAST_JOB = 20.0  # of a killed job, data workers may hold the lock until they notice
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of file systems without


@contextmanager
def claimed_folder(config: TrainConfig, family: str) -> Iterator[Path]:
    """The folder of this run, which no other job can claim meanwhile; refuses to write over another run.

    The operating system lets go of the lock when the process ends, however it ends.
    Raises InputError, on all ranks alike, for a folder that cannot be written, holds a run or is in use.
    """
    locks: list[FileLock] = []
    folder = decided_by_rank_0(lambda: _claim(config, family, locks))
    if locks:
        with suppress(OSError):  # a full disk is reported where it matters
            write_text(folder / HOLDER, json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
    try:
        yield folder
    finally:
        for lock in locks:
            (folder / HOLDER).unlink(missing_ok=True)
            lock.release()


def _claim(config: TrainConfig, family: str, locks: list[FileLock]) -> Path:
    """Choose a folder: lock it before looking into it, or two jobs that start at once would both find it free."""
    if config.output_dir is not None:
        folder = config.output_dir
        _lock(folder, SECONDS_FOR_THE_LAST_JOB, locks)
        if config.resume != "auto" and holds_a_run(folder):
            raise InputError(
                f"--output-dir {folder} already holds a run; resume it with --resume auto, or name another folder"
            )
        return folder
    for number in range(1, 10_000):
        folder = Path("runs") / (family if number == 1 else f"{family}-{number}")
        with suppress(_InUse):
            _lock(folder, 0, locks)
            if not holds_a_run(folder):
                return folder
            while locks:
                locks.pop().release()
    raise InputError("runs/ holds 10,000 runs; name another place with --output-dir")


def holds_a_run(folder: Path) -> bool:
    """True if a run has left anything there that another must not overwrite."""
    return any((folder / name).exists() for name in (METRICS, "checkpoints", "export"))


class _InUse(InputError):
    """Another job holds the folder's lock."""


def _lock(folder: Path, seconds: float, locks: list[FileLock]) -> None:
    """Make the folder and hold its lock, if its file system has locks."""
    with raised_as(
        lambda fault: InputError(f"--output-dir {folder} cannot be written ({fault_of(fault)}); name another folder"),
        OSError,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            raise _InUse(
                f"--output-dir {folder} is in use by another job ({_holder(folder)}); wait for it, stop it, or name "
                "another folder"
            ) from None
        except (OSError, NotImplementedError) as fault:
            if isinstance(fault, OSError) and fault.errno not in _NO_LOCKS:
                raise
            return
    locks.append(lock)


def _holder(folder: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads((folder / HOLDER).read_text())
        return f"process {holder['process']} on {holder['host']}"
    return "unknown process"
