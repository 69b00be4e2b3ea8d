"""From a pattern to the names of shards, and from a shard to a local file, through the cache."""

import hashlib
import io
import os
import re
import stat
import tarfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lib.data.remote.contents import GZIP, check_tar, gunzip, is_gzip, is_web_page
from lib.data.remote.patterns import expanded, local_matches
from lib.data.remote.transfer import (
    ATTEMPTS,
    PIPE,
    SMALL_BYTES,
    ZIPPED,
    Unreachable,
    download,
    is_away,
    is_url,
    read_url,
    remote_matches,
    run_command,
    unreachable,
)
from lib.errors import InputError, raised_as
from lib.files import decode, fault_of, open_file

__all__ = ["Fetcher", "Unreachable", "copy_note", "default_fetcher", "fault"]

JUST_USED = 120.0
"""Seconds for which a shard stays in the cache whatever the limit: its reader may be about to open it."""

LEAST_LIMIT, USUAL_RATIO = 2**30, 100
"""A zipped shard may unpack to LEAST_LIMIT bytes, or USUAL_RATIO times its size if that is more."""

_BAD_GZIP = ".bad_gzip"
_DIGEST = 32


@dataclass(frozen=True)
class Fetcher:
    """Finds shards by pattern and brings them to this machine; nothing is written outside `cache`."""

    cache: Path
    """Root of the local cache; shards lie in its folder "shards"."""
    cache_bytes: int
    """The least recently used shards go when there is more than this; 0: all stay."""
    allow_pipe: bool = False
    """Whether pipe:COMMAND may be run."""

    def find(self, data: str, flag: str) -> tuple[str, ...]:
        """The shards a path, URL or pipe:COMMAND stands for, with braces or a glob: sorted paths or URLs.

        Raises InputError, naming `flag`, for what is not there, not allowed or needs a package.
        """
        self._check_pipe(data, flag)
        found: set[str] = set()
        schemes: set[str] = set()
        for pattern in expanded(data, flag):
            if pattern.startswith(PIPE):
                found.add(pattern)
            elif is_url(pattern):
                found.update(remote_matches(pattern, flag, schemes))
            else:
                found.update(local_matches(_path(pattern), data, flag))
        return tuple(sorted(found))

    def local(self, shard: str) -> str:
        """Path of the shard as an uncompressed local tar, fetched and unpacked into the cache where need be.

        A shard in the cache is used as it is. Raises Unreachable after the last attempt and for what is not there, no
        file or no tar; InputError where the cache cannot be written.
        """
        self._check_pipe(shard, "--data")
        status = None if is_away(shard) else _status_of_file(_path(shard))
        if status and not (shard.lower().endswith(ZIPPED) and _needs_unpacking(shard)):
            return _path(shard)
        name = _cached_name(shard, status)
        if cached := self._cached(name):
            return cached
        with _cache_faults_told(self.cache):
            shards = self.cache / "shards"
            shards.mkdir(parents=True, exist_ok=True)
            with _locked(self._lock(name)) as waited:
                cached = self._cached(name)
                if not cached:
                    # Who waited for another's attempts in vain makes one of its own.
                    cached = _fetch(shard, shards / name, 1 if waited else ATTEMPTS, self.cache_bytes)
            self._make_room()
            return cached

    def reached(self, shard: str) -> str | Unreachable:
        """As `local`, with an Unreachable as the answer where it would raise one: most readers note it and read on."""
        try:
            return self.local(shard)
        except Unreachable as error:
            return error

    def is_here(self, shard: str) -> bool:
        """Whether `local` would give the shard without fetching or unpacking it."""
        with suppress(Unreachable):
            status = None if is_away(shard) else _status_of_file(_path(shard))
            is_plain = status and not shard.lower().endswith(ZIPPED)
            return bool(is_plain) or self._cached(_cached_name(shard, status)) is not None
        return False

    def read_text(self, path_or_url: str) -> str | None:
        """The text of a small file beside the shards, or None where there is none.

        A web page in its place is none: some servers send one for every address. Raises InputError for what cannot be
        reached or read, is too large or no UTF-8 text.
        """
        if path_or_url.startswith(PIPE):
            return None
        with raised_as(lambda fault: _unread(fault, path_or_url), Unreachable, UnicodeDecodeError, OSError):
            content = read_url(path_or_url) if is_url(path_or_url) else _small_file(_path(path_or_url))
            return None if content is None or is_web_page(content) else decode(_unzipped(content))

    def _check_pipe(self, data: str, flag: str) -> None:
        if data.startswith(PIPE) and not self.allow_pipe:
            raise InputError(f"{flag} {data}: commands are not run unless --allow-pipe is given")

    def _lock(self, name: str) -> FileLock:
        locks = self.cache / "locks"
        locks.mkdir(exist_ok=True)
        return FileLock(locks / f"{name[:_DIGEST]}.lock")

    def _cached(self, name: str) -> str | None:
        for path in (self.cache / "shards" / name, self.cache / "shards" / f"{name}{_BAD_GZIP}"):
            if os.path.isfile(path):  # False too for a folder of too long a name, which is told where it is made
                with suppress(OSError):  # a cache that others filled and that is only to be read
                    os.utime(path)
                return str(path)
        return None

    def _make_room(self) -> None:
        """Remove the least recently used shards, those in use excepted, until the rest is within the limit."""
        if not self.cache_bytes:
            return
        with os.scandir(self.cache / "shards") as entries:
            files = [(status.st_mtime, status.st_size, entry.name) for entry in entries if (status := _status(entry))]
        excess = sum(size for _, size, _ in files) - self.cache_bytes
        for used, size, name in sorted(files):
            if excess <= 0 or time.time() - used < JUST_USED:
                return
            path = self.cache / "shards" / name
            with suppress(OSError, Timeout), self._lock(name).acquire(timeout=0):
                if path.stat().st_mtime == used:
                    path.unlink()
                    excess -= size


def default_fetcher() -> Fetcher:
    """The fetcher of commands that name no cache: 50 GiB below the user's cache folder, and no commands."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Fetcher(folder / "contrastive-training", 50 * 2**30)


def fault(path: str) -> str | None:
    """Reason "bad_gzip" for a tar of which only the beginning could be unpacked, else None."""
    return "bad_gzip" if path.endswith(_BAD_GZIP) else None


def copy_note(shard: str, path: str) -> str:
    """Words to put behind a fetched shard that is damaged, for the user to remove its copy; "" for local shards."""
    return f" (its copy is {path}: remove it to fetch the shard again)" if is_away(shard) else ""


def _path(shard: str) -> str:
    return shard.removeprefix("file://")


def _status_of_file(path: str) -> os.stat_result:
    """Its size and date; raises Unreachable for what is not there, and for a FIFO or device, which could block."""
    with raised_as(unreachable, OSError, ValueError):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Unreachable("not_a_file", "a FIFO, device or folder, not a file")
    return status


def _needs_unpacking(shard: str) -> bool:
    """Whether a local file is zipped as its name says; a tar under a wrong name is taken as it is."""
    with raised_as(unreachable, OSError), open_file(_path(shard)) as file:
        return file.read(262)[257:] != b"ustar"


def _small_file(path: str) -> bytes | None:
    """Its bytes, or None where there is none; raises Unreachable beyond SMALL_BYTES."""
    with suppress(FileNotFoundError, NotADirectoryError), open_file(path) as file:
        content = file.read(SMALL_BYTES + 1)
        if len(content) > SMALL_BYTES:
            raise Unreachable("too_large", f"more than {SMALL_BYTES:,} bytes")
        return content
    return None


def _unread(error: Exception, path_or_url: str) -> InputError:
    """The error of `read_text`, with what to do."""
    problem, remedy = f"cannot be read ({fault_of(error)})", "check the file"
    if isinstance(error, UnicodeDecodeError):
        problem, remedy = "is not UTF-8 text", "save it as UTF-8, or remove it"
    elif isinstance(error, Unreachable):
        problem = f"cannot be reached or read ({error.detail})"
        remedy = "check the network" if is_url(path_or_url) else remedy
    return InputError(f"--data: {path_or_url.partition('?')[0]} {problem}; {remedy}")


def _unzipped(content: bytes) -> bytes:
    """The content without the compression that some servers apply unasked."""
    if not content.startswith(GZIP):
        return content
    unpacked = io.BytesIO()
    if not gunzip(io.BytesIO(content), unpacked, SMALL_BYTES):
        raise Unreachable("bad_gzip", "its compressed content is damaged or cut short")
    return unpacked.getvalue()


def _cached_name(shard: str, status: os.stat_result | None) -> str:
    """A hash of what the shard is, then what can be read of its name; a local file, of `status`, by size and date."""
    identity = shard
    readable = "pipe" if shard.startswith(PIPE) else shard.partition("?")[0]
    if status:
        identity = f"{os.path.abspath(_path(shard))}\x1f{status.st_size}\x1f{status.st_mtime_ns}"
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=_DIGEST // 2).hexdigest()
    readable = re.sub(r"(\.tar)?(\.gz|\.tgz|\.tar)?$", "", os.path.basename(readable))
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', readable)[-80:]}.tar"


@contextmanager
def _locked(lock: FileLock) -> Iterator[bool]:
    """One process at a time; yields whether another had to be waited for."""
    waited = True
    with suppress(Timeout):
        lock.acquire(timeout=0)
        waited = False
    if waited:
        lock.acquire()
    try:
        yield waited
    finally:
        lock.release()


def _cache_faults_told(cache: Path) -> AbstractContextManager[None]:
    wrong, remedy = f"--cache-dir {cache} cannot be written", "name a folder that can"
    # ValueError: of a name that no folder can have.
    return raised_as(lambda fault: InputError(f"{wrong} ({fault_of(fault)}); {remedy}"), OSError, ValueError)


def _fetch(shard: str, target: Path, attempts: int, cache_bytes: int) -> str:
    """Download or run, unpack, look what it is, and only then give the file its name; returns its path."""
    part, unpacked = Path(f"{target}.part"), Path(f"{target}.unpacked")
    try:
        if shard.startswith(PIPE):
            run_command(shard, str(part), attempts)
        elif is_url(shard):
            part.touch()  # a fault of the cache must not look like one of the remote
            download(shard, str(part), attempts)
        ready, packed = part, part if is_away(shard) else Path(_path(shard))
        if packed != part or is_gzip(part):
            ready = unpacked
            if not _unpack(packed, unpacked, cache_bytes):
                target = Path(f"{target}{_BAD_GZIP}")
        check_tar(ready)
        os.replace(ready, target)
        return str(target)
    finally:
        part.unlink(missing_ok=True)
        unpacked.unlink(missing_ok=True)


def _unpack(packed: Path, unpacked: Path, cache_bytes: int) -> bool:
    with open_file(packed) as source, open(unpacked, "wb") as output:
        usual = max(LEAST_LIMIT, USUAL_RATIO * os.fstat(source.fileno()).st_size)
        whole = gunzip(source, output, min(cache_bytes or usual, usual))
        if output.tell() < (1 if whole else tarfile.BLOCKSIZE):
            raise Unreachable("bad_gzip", f"no sample in {packed.name} can be unpacked")
    return whole


def _status(entry: os.DirEntry) -> os.stat_result | None:
    with suppress(FileNotFoundError):  # another process removed it
        return entry.stat()
    return None
