"""From a pattern to the names of shards, and from a shard to a local tar, through the cache.

fsspec downloads, but its own cache folders are not used: `filecache` and `simplecache` write straight to the final
name, so another rank would read a half-written shard, and an interrupted download would count as whole. Here a shard
is written under another name, checked, and renamed.
"""

import glob
import gzip
import hashlib
import io
import os
import re
import stat
import tarfile
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # its stubs lack the first
from filelock import FileLock, Timeout

from lib.data.remote import (
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
)
from lib.errors import InputError, raised_as
from lib.files import decode, fault_of, open_file, without_secrets

JUST_USED = 120.0
"""Seconds for which a shard stays in the cache whatever the limit: its reader may be about to open it."""
LEAST_LIMIT, USUAL_RATIO = 2**30, 100
"""A zipped shard may unpack to LEAST_LIMIT bytes, or USUAL_RATIO times its size if that is more."""
MOST_NAMES = 1_000_000
"""Names that a brace pattern may stand for."""

_MOST_BRACES = 100
_GZIP = b"\x1f\x8b"
_BAD_GZIP = ".bad_gzip"
_PIECE = 1 << 18
_DIGEST = 32
_SHOWN = 24


@dataclass(frozen=True)
class Fetcher:
    """Finds shards by pattern and brings them to this machine; nothing is written outside `cache`."""

    cache: Path
    """Root of the local cache; shards lie in its folder "shards"."""
    cache_bytes: int
    """The least recently used shards are removed beyond this; 0: all stay."""
    allow_pipe: bool = False
    """Permission to run pipe:COMMAND."""

    def find(self, data: str, flag: str) -> tuple[str, ...]:
        """The shards of a path, URL or pipe:COMMAND, with braces or a glob: sorted paths or URLs.

        Raises InputError, naming `flag`, for one that is not there, not allowed or needs a package.
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
                found.update(_local_matches(_path(pattern), data, flag))
        return tuple(sorted(found))

    def local(self, shard: str) -> str:
        """Path of the shard as an uncompressed local tar, downloaded and unpacked into the cache where necessary.

        A shard in the cache is used as it is. Raises Unreachable after the last attempt, and for a shard that is not
        there, no file or no tar; InputError where the cache cannot be written.
        """
        self._check_pipe(shard, "--data")
        status = None if is_away(shard) else _status_of_file(_path(shard))
        if status and not (shard.lower().endswith(ZIPPED) and _needs_unpacking(shard)):
            return _path(shard)
        name = _cached_name(shard, status)
        if cached := self._cached(name):
            return cached
        wrong, remedy = f"--cache-dir {self.cache} cannot be written", "name a folder that can"
        # ValueError: a name that no folder can have.
        with raised_as(lambda fault: InputError(f"{wrong} ({fault_of(fault)}); {remedy}"), OSError, ValueError):
            shards = self.cache / "shards"
            shards.mkdir(parents=True, exist_ok=True)
            # The lock is shared by all ranks, workers and runs on this cache: one downloads, the others wait for it.
            lock, attempts = self._lock(name), ATTEMPTS
            try:
                held = lock.acquire(timeout=0)
            except Timeout:
                held, attempts = lock.acquire(), 1  # if the other process failed, it has made the attempts
            with held:
                cached = self._cached(name) or _fetch(shard, shards / name, attempts, self.cache_bytes)
            self._make_room()
            return cached

    def reached(self, shard: str) -> str | Unreachable:
        """As `local`, but returns an Unreachable instead of raising it: most readers count it and continue."""
        try:
            return self.local(shard)
        except Unreachable as error:
            return error

    def is_here(self, shard: str) -> bool:
        """True if `local` would need no download and no unpacking."""
        with suppress(Unreachable):
            status = None if is_away(shard) else _status_of_file(_path(shard))
            is_plain = status and not shard.lower().endswith(ZIPPED)
            return bool(is_plain) or self._cached(_cached_name(shard, status)) is not None
        return False

    def read_text(self, path_or_url: str) -> str | None:
        """The text of a small file beside the shards, or None where there is none.

        A web page in its place counts as none: some servers send one for every address. Raises InputError for a file
        that cannot be reached or read, is too large or no UTF-8 text.
        """
        if path_or_url.startswith(PIPE):
            return None
        with raised_as(lambda fault: _unread(fault, path_or_url), Unreachable, UnicodeDecodeError, OSError):
            content = read_url(path_or_url) if is_url(path_or_url) else _small_file(_path(path_or_url))
            return None if content is None or _is_web_page(content) else decode(_unzipped(content))

    def _check_pipe(self, data: str, flag: str) -> None:
        if data.startswith(PIPE) and not self.allow_pipe:
            raise InputError(f"{flag} {data}: commands are not run unless --allow-pipe is given")

    def _lock(self, name: str) -> FileLock:
        locks = self.cache / "locks"
        locks.mkdir(exist_ok=True)
        return FileLock(locks / f"{name[:_DIGEST]}.lock")

    def _cached(self, name: str) -> str | None:
        for path in (self.cache / "shards" / name, self.cache / "shards" / f"{name}{_BAD_GZIP}"):
            if os.path.isfile(path):  # also False for a folder of too long a name: `local` reports it
                with suppress(OSError):  # a cache that others filled and that is read-only here
                    os.utime(path)
                return str(path)
        return None

    def _make_room(self) -> None:
        """Remove the least recently used shards, except those in use, until the rest is within the limit."""
        if not self.cache_bytes:
            return
        files = []
        with os.scandir(self.cache / "shards") as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process removed it
                    files.append((entry.stat().st_mtime, entry.stat().st_size, entry.name))
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


def expanded(pattern: str, flag: str) -> list[str]:
    """The names of a brace pattern, as bash expands it; a pattern that is the name of a file stays as it is.

    Raises InputError, naming `flag`, for a brace that is not closed and for more than MOST_NAMES.
    """
    if os.path.isfile(pattern):
        return [pattern]
    with raised_as(lambda fault: _unreadable(fault, pattern, flag), ValueError):
        if pattern.count("{") > _MOST_BRACES:
            raise ValueError
        if _count_names(pattern) > MOST_NAMES:  # before any is made: a wrong number would fill the memory
            wrong = f"the braces stand for more than {MOST_NAMES:,} names"
            raise InputError(f"{flag} {pattern}: {wrong}; check the numbers")
        return list(braceexpand(pattern))


def _count_names(pattern: str) -> int:
    """Count the names of a brace pattern: each innermost group is replaced by its count until none is left."""

    def product(text: str) -> int:
        return prod(map(int, re.findall("\0([0-9]+)\0", text)))

    def counted(group: re.Match[str]) -> str:
        if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", group[1]):
            first, last, step = (int(number or 1) for number in numbers.groups())
            return f"\0{abs(last - first) // (step or 1) + 1}\0"
        if re.fullmatch(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?", group[1]):
            return f"\0{len(list(braceexpand(group[0])))}\0"
        return f"\0{sum(map(product, group[1].split(',')))}\0"

    pattern, left = re.sub(r"\\.", "", pattern), 1  # a backslash makes a brace part of the name
    while left:
        pattern, left = re.subn(r"\{([^{}]*)\}", counted, pattern)
    return product(pattern)


def _unreadable(error: Exception, pattern: str, flag: str) -> InputError:
    if isinstance(error, UnbalancedBracesError):
        return InputError(f"{flag} {pattern}: a brace is not closed; write it as in 'a-{{0..9}}.tar'")
    # Numbers of thousands of digits, or too many braces.
    return InputError(f"{flag} {without_secrets(pattern)[:100]}...: the braces cannot be read; write 'a-{{0..9}}.tar'")


def _local_matches(pattern: str, data: str, flag: str) -> list[str]:
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
    if not found:
        raise InputError(f"{flag} {data}: there is no file {pattern}; check the folder and the pattern")
    return found


def fault(path: str) -> str | None:
    """Reason "bad_gzip" for a tar that could only be unpacked up to some damage, else None."""
    return "bad_gzip" if path.endswith(_BAD_GZIP) else None


def copy_note(shard: str, path: str) -> str:
    """A hint to remove the cached copy of a damaged remote shard; "" for local shards."""
    return f" (its copy is {path}: remove it to fetch the shard again)" if is_away(shard) else ""


def _path(shard: str) -> str:
    return shard.removeprefix("file://")


def _unreachable(error: Exception) -> Unreachable:
    return Unreachable("unreachable", fault_of(error))


def _status_of_file(path: str) -> os.stat_result:
    """Size and date of a file; raises Unreachable if it is missing, or a FIFO or device, which could block."""
    with raised_as(_unreachable, OSError, ValueError):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Unreachable("not_a_file", "a FIFO, device or folder, not a file")
    return status


def _needs_unpacking(shard: str) -> bool:
    """True for a local file that is zipped as its name says; a tar with a wrong name is used as it is."""
    with raised_as(_unreachable, OSError), open_file(_path(shard)) as file:
        return file.read(262)[257:] != b"ustar"


def _small_file(path: str) -> bytes | None:
    """The bytes of a local file, or None where there is none; raises Unreachable beyond SMALL_BYTES."""
    with suppress(FileNotFoundError, NotADirectoryError), open_file(path) as file:
        content = file.read(SMALL_BYTES + 1)
        if len(content) > SMALL_BYTES:
            raise Unreachable("too_large", f"more than {SMALL_BYTES:,} bytes")
        return content
    return None


def _unread(error: Exception, path_or_url: str) -> InputError:
    """The error of `read_text`, with its remedy."""
    problem, remedy = f"cannot be read ({fault_of(error)})", "check the file"
    if isinstance(error, UnicodeDecodeError):
        problem, remedy = "is not UTF-8 text", "save it as UTF-8, or remove it"
    elif isinstance(error, Unreachable):
        problem = f"cannot be reached or read ({error.detail})"
        remedy = "check the network" if is_url(path_or_url) else remedy
    return InputError(f"--data: {path_or_url.partition('?')[0]} {problem}; {remedy}")


def _unzipped(content: bytes) -> bytes:
    """The content without the compression that some servers apply without being asked."""
    if not content.startswith(_GZIP):
        return content
    unpacked = io.BytesIO()
    if not gunzip(io.BytesIO(content), unpacked, SMALL_BYTES):
        raise Unreachable("bad_gzip", "its compressed content is damaged or cut short")
    return unpacked.getvalue()


def _cached_name(shard: str, status: os.stat_result | None) -> str:
    """A hash of the shard's address, then a readable form of its name; a local file counts by its size and date too."""
    identity = shard
    readable = "pipe" if shard.startswith(PIPE) else shard.partition("?")[0]
    if status:
        identity = f"{os.path.abspath(_path(shard))}\x1f{status.st_size}\x1f{status.st_mtime_ns}"
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=_DIGEST // 2).hexdigest()
    readable = re.sub(r"(\.tar)?(\.gz|\.tgz|\.tar)?$", "", os.path.basename(readable))
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', readable)[-80:]}.tar"


def _fetch(shard: str, target: Path, attempts: int, cache_bytes: int) -> str:
    """Download or run, unpack, check, and only then give the file its name; returns its path."""
    packed, unpacked = Path(f"{target}.part"), Path(f"{target}.unpacked")
    try:
        if shard.startswith(PIPE):
            run_command(shard, str(packed), attempts)
        elif is_url(shard):
            packed.touch()  # a fault of the cache must not look like one of the remote
            download(shard, str(packed), attempts)
        ready = packed
        if not is_away(shard) or _begins_with(packed, _GZIP):
            ready = unpacked
            if not _unpack(packed if is_away(shard) else Path(_path(shard)), unpacked, cache_bytes):
                target = Path(f"{target}{_BAD_GZIP}")
        _check_tar(ready)
        # Within one folder a rename is atomic: under its final name a shard is whole or absent, even after a kill.
        os.replace(ready, target)
        return str(target)
    finally:
        packed.unlink(missing_ok=True)
        unpacked.unlink(missing_ok=True)


def _begins_with(path: Path, start: bytes) -> bool:
    with open_file(path) as file:
        return file.read(len(start)) == start


def _unpack(packed: Path, unpacked: Path, cache_bytes: int) -> bool:
    """Unpack a file as `gunzip` does; raises Unreachable where not even the first header comes out."""
    with open_file(packed) as source, open(unpacked, "wb") as output:
        usual = max(LEAST_LIMIT, USUAL_RATIO * os.fstat(source.fileno()).st_size)
        whole = gunzip(source, output, min(cache_bytes or usual, usual))
        if output.tell() < (1 if whole else tarfile.BLOCKSIZE):
            raise Unreachable("bad_gzip", f"no sample in {packed.name} can be unpacked")
    return whole


def gunzip(packed: BinaryIO, unpacked: BinaryIO, most_bytes: float) -> bool:
    """Unpack a gzip file piece by piece; False if it is damaged or cut short, after the pieces before the damage.

    Raises Unreachable: too_large where more than `most_bytes` come out (a gzip bomb), unreachable where the packed
    file cannot be read.
    """
    with gzip.GzipFile(fileobj=packed) as source:
        while True:
            try:
                piece = source.read1(_PIECE)  # `read` would lose what came before the damage
            except (EOFError, zlib.error, gzip.BadGzipFile):
                return False
            except OSError as failing:  # a failing disk; errors of writing below are the cache's
                raise _unreachable(failing) from failing
            if not piece:
                return True
            unpacked.write(piece)
            if unpacked.tell() > most_bytes:
                raise Unreachable("too_large", f"unpacked it has more than {most_bytes:,.0f} bytes")


def _is_web_page(content: bytes) -> bool:
    """True for content that begins as HTML does: a login page, for example, in place of the file."""
    return content.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype html", b"<html"))


def _check_tar(path: Path) -> None:
    """Raise Unreachable, reason not_a_tar, for a file that does not begin as a tar does; an empty tar is one."""
    with open_file(path) as file:
        head = file.read(tarfile.BLOCKSIZE)
    if head == bytes(tarfile.BLOCKSIZE):  # the end of an archive
        return
    with suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")  # verifies the header's checksum
        return
    if len(head) < tarfile.BLOCKSIZE or head[257:262] != b"ustar":
        begins = "an HTML page: is a login needed?" if _is_web_page(head) else f"it begins with {head[:_SHOWN]!r}"
        raise Unreachable("not_a_tar", begins if head else "an empty file")
