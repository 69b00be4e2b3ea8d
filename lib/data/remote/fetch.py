"""Owns the way of a shard to a local file: from a pattern to names, and through the cache."""

import glob
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from braceexpand import (  # type: ignore[attr-defined]  # its stubs leave the exception out
    UnbalancedBracesError,
    braceexpand,
)
from filelock import FileLock, Timeout

from lib.data.remote.gunzip import gunzip, is_gzip
from lib.data.remote.transfer import (
    ATTEMPTS,
    PIPE,
    ZIPPED,
    Unreachable,
    download,
    is_away,
    is_url,
    read_url,
    remote_matches,
    run_command,
)
from lib.errors import InputError

__all__ = ["Fetcher", "Unreachable", "default_fetcher", "fault"]

JUST_USED = 120.0
"""Seconds for which a shard stays in the cache whatever the limit: its reader may be about to open it."""

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
        for pattern in _patterns(data, flag):
            if pattern.startswith(PIPE):
                found.add(pattern)
            elif is_url(pattern):
                found.update(remote_matches(pattern, flag))
            else:
                found.update(_local_matches(pattern, data, flag))
        return tuple(sorted(found))

    def local(self, shard: str) -> str:
        """Path of the shard as an uncompressed local tar, fetched and unpacked into the cache where need be.

        A shard in the cache is used as it is. Raises Unreachable after the last attempt, InputError where the
        cache cannot be written.
        """
        self._check_pipe(shard, "--data")
        if not is_away(shard) and not (shard.lower().endswith(ZIPPED) and _needs_unpacking(shard)):
            return _path(shard)
        name = _cached_name(shard)
        if cached := self._cached(name):
            return cached
        with _cache_faults_told(self.cache):
            shards = self.cache / "shards"
            shards.mkdir(parents=True, exist_ok=True)
            with _locked(self._lock(name)) as waited:
                cached = self._cached(name)
                if not cached:
                    # Who waited for another's attempts in vain makes one of its own.
                    cached = _fetch(shard, shards / name, attempts=1 if waited else ATTEMPTS)
            self._make_room()
            return cached

    def read_text(self, path_or_url: str) -> str | None:
        """The text of a small file beside the shards, or None where there is none.

        Raises InputError where the remote cannot be reached.
        """
        if path_or_url.startswith(PIPE):
            return None
        try:
            if is_url(path_or_url):
                return read_url(path_or_url)
            return Path(_path(path_or_url)).read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Unreachable as error:
            address = path_or_url.partition("?")[0]
            raise InputError(f"--data: {address} cannot be reached ({error.detail}); check the network") from None

    def _check_pipe(self, data: str, flag: str) -> None:
        if data.startswith(PIPE) and not self.allow_pipe:
            raise InputError(f"{flag} {data}: commands are not run unless --allow-pipe is given")

    def _lock(self, name: str) -> FileLock:
        locks = self.cache / "locks"
        locks.mkdir(exist_ok=True)
        return FileLock(locks / f"{name[:_DIGEST]}.lock")

    def _cached(self, name: str) -> str | None:
        for path in (self.cache / "shards" / name, self.cache / "shards" / f"{name}{_BAD_GZIP}"):
            if path.is_file():
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


def _patterns(data: str, flag: str) -> list[str]:
    if os.path.isfile(data):
        return [data]
    try:
        return list(braceexpand(data))
    except UnbalancedBracesError:
        raise InputError(f"{flag} {data}: a brace is not closed; write it as in 'a-{{0..9}}.tar'") from None


def _local_matches(pattern: str, data: str, flag: str) -> list[str]:
    pattern = _path(pattern)
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
    if not found:
        raise InputError(f"{flag} {data}: there is no file {pattern}; check the folder and the pattern")
    return found


def _path(shard: str) -> str:
    return shard.removeprefix("file://")


def _needs_unpacking(shard: str) -> bool:
    """Whether a local file is zipped as its name says; a tar under a wrong name is taken as it is."""
    try:
        with open(_path(shard), "rb") as file:
            return file.read(262)[257:] != b"ustar"
    except OSError as error:
        raise Unreachable("unreachable", error.strerror or str(error)) from None


def _cached_name(shard: str) -> str:
    """A hash of what the shard is, then what can be read of its name; a local file is also its size and date."""
    identity = shard
    readable = "pipe" if shard.startswith(PIPE) else shard.partition("?")[0]
    if not is_away(shard):
        status = os.stat(_path(shard))
        identity = f"{os.path.abspath(_path(shard))}\x1f{status.st_size}\x1f{status.st_mtime_ns}"
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=_DIGEST // 2).hexdigest()
    readable = re.sub(r"(\.tar)?(\.gz|\.tgz|\.tar)?$", "", os.path.basename(readable))
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', readable)[-80:]}.tar"


@contextmanager
def _locked(lock: FileLock) -> Iterator[bool]:
    """One process at a time; yields whether another had to be waited for."""
    waited = False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waited = True
        lock.acquire()
    try:
        yield waited
    finally:
        lock.release()


@contextmanager
def _cache_faults_told(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--cache-dir {cache} cannot be written ({reason}); name a folder that can") from None


def _fetch(shard: str, target: Path, attempts: int) -> str:
    """Download or run, unpack, and only then give the file its name; returns its path."""
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
            if not _unpack(packed, unpacked):
                target = Path(f"{target}{_BAD_GZIP}")
        os.replace(ready, target)
        return str(target)
    finally:
        part.unlink(missing_ok=True)
        unpacked.unlink(missing_ok=True)


def _unpack(packed: Path, unpacked: Path) -> bool:
    with open(packed, "rb") as source, open(unpacked, "wb") as output:
        whole = gunzip(source, output)
        if not output.tell():
            raise Unreachable("bad_gzip", str(packed))
    return whole


def _status(entry: os.DirEntry) -> os.stat_result | None:
    with suppress(FileNotFoundError):  # another process removed it
        return entry.stat()
    return None
