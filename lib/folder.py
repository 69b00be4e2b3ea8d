"""The run's folder: chosen by rank 0 for all, seen to be writable, and locked against a second job."""

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from lib.collectives import gather_objects
from lib.config import TrainConfig
from lib.data.fields import is_utf8
from lib.errors import InputError, RunError
from lib.report import METRICS

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO, errno.ESTALE}
LOCK, HOLDER = ".lock", ".lock_holder.json"
SECONDS_FOR_THE_LAST_JOB = 20  # of a killed job, data workers may hold the lock until they notice


@contextmanager
def claimed_folder(config: TrainConfig, family: str, accelerator: Accelerator) -> Iterator[Path]:
    """The folder of this run, which no other job can claim meanwhile; refuses to write over another run.

    The operating system lets go of the lock when the process ends, however it ends.
    Raises InputError, on all ranks alike, for a folder that cannot be written, holds a run or is in use.
    """
    lock: FileLock | None = None
    choice: Path | InputError | None = None
    if accelerator.is_main_process:
        try:
            choice = _choose(config, family)
            lock = _lock(choice)
        except InputError as error:
            choice = error
    choice = gather_objects(choice)[0]
    if isinstance(choice, InputError):
        raise choice
    assert choice is not None, "rank 0 chooses"
    try:
        yield choice
    finally:
        if lock is not None:
            (choice / HOLDER).unlink(missing_ok=True)
            lock.release()


def _choose(config: TrainConfig, family: str) -> Path:
    folder = config.output_dir
    if folder is None:
        names = [Path("runs") / (family if number == 1 else f"{family}-{number}") for number in range(1, 10_000)]
        folder = next(name for name in names if not name.exists())
    elif config.resume != "auto" and os.path.exists(folder / METRICS):  # False too for too long a name, see below
        raise InputError(
            f"--output-dir {folder} already holds a run; go on with it by --resume auto, or name another folder"
        )
    if not is_utf8(str(folder)):
        raise InputError(
            f"--output-dir {folder} is not UTF-8, which a tokenizer needs to be saved; name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--output-dir {folder} cannot be written ({error.strerror}); name another folder") from None
    return folder


def _lock(folder: Path) -> FileLock | None:
    """Hold the folder's lock; None on a file system that has no locks."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=SECONDS_FOR_THE_LAST_JOB)
    except Timeout:
        raise InputError(
            f"--output-dir {folder} is in use by another job ({_holder(folder)}); wait for it, stop it, or name "
            "another folder"
        ) from None
    except (OSError, NotImplementedError):
        return None
    with suppress(OSError):  # a full disk is told of where it matters
        (folder / HOLDER).write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
    return lock


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, ValueError, KeyError):
        return "which has not said its name"


@contextmanager
def full_disk_told(standing: Callable[[], Path | None]) -> Iterator[None]:
    """Turn the errors of a disk that is full, read-only or gone into a RunError that names what to go on from."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        raise RunError(
            f"{error}; the last whole checkpoint is {standing()}. Make room or name another --output-dir, and go on "
            "with --resume",
            of_one_rank=True,
        ) from error
