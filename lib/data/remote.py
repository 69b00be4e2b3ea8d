"""Transfers from other machines through fsspec, and from commands, with retries and limits of time and size."""

import errno
import inspect
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, TypeVar

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from lib.data.order import draw
from lib.errors import InputError, raised_as
from lib.files import without_secrets

ATTEMPTS = 5
BASE_DELAY = 1.0
"""Mean seconds before the second attempt; doubled before each further one."""
LEAST_RATE = 1024.0
"""Bytes a second; a transfer slower than this over SLOW_SECONDS (commands: SLOW_COMMAND_SECONDS) is given up."""
SLOW_SECONDS, SLOW_COMMAND_SECONDS = 60.0, 300.0
LONGEST = 6 * 3600.0
"""Seconds after which the transfer of a shard is given up and no further attempt begins."""
SMALL_BYTES, SMALL_SECONDS = 64 * 2**20, 120.0
"""Limits of a small file beside the shards."""

PIPE = "pipe:"
TARS = (".tar", ".tar.gz", ".tgz")
"""Endings of the names of shards."""
ZIPPED = (".gz", ".tgz")
"""Endings of the names of shards that have to be unpacked."""

_HTTP = ("http", "https")
_SECONDS_OF_SILENCE = 60
_POLL_SECONDS = 0.5
_DETAIL = 300  # characters of an error's text
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# Object stores answer "forbidden" for objects that do not exist.
_REFUSALS = (401, 403, 404, 410)

T = TypeVar("T")


class Unreachable(Exception):
    """A shard that cannot be used; `reason` is unreachable, not_a_file, not_a_tar, bad_gzip or too_large."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Refused(Unreachable):
    """A remote answered that it has no such file or does not give it to us, so asking again is useless."""


class Pace(Callback):
    """Progress of one transfer, in bytes; every report raises Unreachable if it is too slow, too long or too large.

    window: seconds over which LEAST_RATE must be kept. longest: seconds for the whole transfer.
    """

    def __init__(self, window: float, longest: float, most_bytes: float = math.inf) -> None:
        super().__init__()
        self.window, self.longest, self.most_bytes = window, longest, most_bytes
        self.began = self.since = time.monotonic()
        self.bytes_then = 0

    def call(self, hook_name: str | None = None, **kwargs: object) -> None:
        """Check the progress; fsspec's filesystems call this for every piece they receive."""
        now = time.monotonic()
        if max(self.value, self.size or 0) > self.most_bytes:
            raise Unreachable("too_large", f"more than {self.most_bytes:,.0f} bytes")
        if now - self.began > self.longest:
            raise Unreachable("unreachable", f"not finished within {self.longest:,.0f} seconds")
        if now - self.since >= self.window:
            if self.value - self.bytes_then < LEAST_RATE * (now - self.since):
                came = f"{self.value - self.bytes_then:,} bytes in {now - self.since:.0f} seconds"
                raise Unreachable("unreachable", f"too slow, {came}")
            self.since, self.bytes_then = now, self.value


def is_url(data: str) -> bool:
    """True for an address on a network; file:// is a local path."""
    return "://" in data and not data.startswith(("file://", PIPE))


def is_away(shard: str) -> bool:
    """True for a shard that has to be brought here: an address or a command."""
    return shard.startswith(PIPE) or is_url(shard)


def remote_matches(url: str, flag: str, schemes: set[str]) -> list[str]:
    """The URL itself, without a request, or the files that a glob in it finds; InputError naming `flag` on failure.

    schemes: schemes already found usable, which are not checked again; the URL's scheme is added.
    """
    # In HTTP addresses "?" and "[" are parts of the name.
    is_glob = any(letter in url for letter in ("*" if _scheme(url) in _HTTP else "*?["))
    if is_glob or _scheme(url) not in schemes:
        filesystem = _filesystem(url, flag, SMALL_SECONDS)
        schemes.add(_scheme(url))
    if not is_glob:
        return [url]
    with raised_as(lambda fault: _not_listed(fault, url, flag), Unreachable, NotImplementedError):
        names = attempted(lambda: filesystem.glob(url), url)
    if not names:
        raise InputError(f"{flag} {url}: there is no such file; check the address and the pattern")
    return [filesystem.unstrip_protocol(name) for name in names]


def read_url(url: str) -> bytes | None:
    """Read a small file, None where the remote has none; raises Unreachable, also beyond SMALL_BYTES.

    Raises OSError where this machine has no room for a copy.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "file")
        with suppress(Refused):
            attempted(lambda: _get(url, path, Pace(SLOW_SECONDS, SMALL_SECONDS, SMALL_BYTES)), url)
            with open(path, "rb") as file:
                return file.read()
    return None


def download(url: str, path: str, attempts: int) -> None:
    """Download a file to `path`, whole; raises Unreachable, or OSError where `path` cannot be written."""
    attempted(lambda: _get(url, path, Pace(SLOW_SECONDS, LONGEST)), url, attempts)


def _get(url: str, path: str, pace: Pace) -> None:
    _filesystem(url, "--data", pace.longest).get_file(url, path, callback=pace)
    size = os.path.getsize(path)
    # Not every filesystem notices a connection that ended early.
    if pace.size is not None and size != pace.size:
        raise ConnectionError(f"cut short, {size} of {pace.size} bytes")


def run_command(shard: str, path: str, attempts: int) -> None:
    """Write the output of pipe:COMMAND to `path`; raises Unreachable where the command fails."""
    command = f"set -o pipefail; {shard.removeprefix(PIPE)}"

    def run() -> None:
        with open(path, "wb") as output, tempfile.TemporaryFile() as errors:
            code = _exit_code(command, output, errors)
            errors.seek(max(0, os.fstat(errors.fileno()).st_size - _DETAIL))
            said = errors.read(_DETAIL).decode("utf-8", errors="replace").strip().split("\n")[-1]
            if code:
                os.write(output.fileno(), b"\0")  # raises OSError where the disk is full: not the command's fault
        if code:
            raise ConnectionError(f"exit code {code}{': ' * bool(said)}{said}")

    attempted(run, shard, attempts)


def _exit_code(command: str, output: BinaryIO, errors: BinaryIO) -> int:
    """Run a command to its end; kill it and every process it started where its output is too slow."""
    process = subprocess.Popen(
        ["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
    )
    pace = Pace(SLOW_COMMAND_SECONDS, LONGEST)
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS)
            pace.absolute_update(os.fstat(output.fileno()).st_size)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def attempted(get: Callable[[], T], name: str, attempts: int = ATTEMPTS) -> T:
    """Return the value of `get`, retried after growing pauses; raises Unreachable after the last attempt.

    A refusal is not retried. An Unreachable of `get` itself (too slow, too large) costs much time and is retried
    once. No attempt begins after LONGEST.
    """
    began = time.monotonic()
    for attempt in range(1, attempts + 1):
        try:
            return get()
        except Exception as error:  # every filesystem has errors of its own
            if isinstance(error, NotImplementedError | InputError) or getattr(error, "errno", None) in _DISK_FAULTS:
                raise
            fault = _fault_of_attempt(error)
            attempts = min(attempts, 2) if isinstance(error, Unreachable) else attempts
        if isinstance(fault, Refused) or attempt >= attempts or time.monotonic() - began > LONGEST:
            break
        if attempt == 1:
            print(f"{without_secrets(name)} failed ({fault.detail}), trying again", file=sys.stderr, flush=True)
        # Every process has another jitter, so that a server that was down is not asked by all of them at once.
        jitter = 0.5 + draw("retry", name, os.getpid(), attempt) / 2**63
        time.sleep(BASE_DELAY * 2 ** (attempt - 1) * jitter)
    raise fault


def _fault_of_attempt(error: Exception) -> Unreachable:
    if isinstance(error, Unreachable):
        return error
    is_refused = isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", 0) in _REFUSALS
    return (Refused if is_refused else Unreachable)("unreachable", _one_line(error))


def _not_listed(error: Exception, url: str, flag: str) -> InputError:
    detail = error.detail if isinstance(error, Unreachable) else "it has no listing"
    return InputError(f"{flag} {url}: cannot be listed ({detail}); write braces, as in 'a-{{0..9}}.tar'")


def _filesystem(url: str, flag: str, longest: float) -> fsspec.AbstractFileSystem:
    """Make the filesystem of an address; InputError naming `flag` where there is none or it cannot be made.

    longest: seconds for one HTTP request including its answer.
    """
    scheme = _scheme(url)
    # Every filesystem has errors of its own.
    with raised_as(lambda fault: InputError(f"{flag} {url}: {_why_unusable(fault, scheme)}"), Exception):
        options = _http_options(longest) if scheme in _HTTP else {}
        # Checked first: a filesystem that lacks an argument (ftp its host) is half made and prints a traceback later.
        inspect.signature(fsspec.get_filesystem_class(scheme).__init__).bind(None, **options)
        filesystem = fsspec.filesystem(scheme, **options)
    if isinstance(filesystem, LocalFileSystem):
        raise InputError(f"{flag} {url}: {scheme}:// is this machine; give the path alone")
    return filesystem


def _why_unusable(error: Exception, scheme: str) -> str:
    if isinstance(error, ImportError):
        package = known_implementations.get(scheme, {}).get("class", "").partition(".")[0]
        package = "aiohttp" if scheme in _HTTP else package
        return f"needs {package}; pip install {package}" if package not in ("", "fsspec") else _one_line(error)
    if isinstance(error, TypeError | ValueError):  # fsspec does not know it, or it needs more than an address
        return f"{scheme}:// is not known; give http, https, s3, gs or hf"
    return f"{scheme}:// cannot be used ({_one_line(error)})"


def _http_options(longest: float) -> dict:
    import aiohttp  # here, so that a missing package is an error only for those who need it

    # By default aiohttp gives up on any download after five minutes.
    timeout = aiohttp.ClientTimeout(total=longest, sock_connect=_SECONDS_OF_SILENCE, sock_read=_SECONDS_OF_SILENCE)
    # Content that a server compresses stays compressed: its size is that of Content-Length, and unpacking has a limit.
    settings = {"timeout": timeout, "trust_env": True, "auto_decompress": False}
    return {"client_kwargs": settings | {"headers": {"Accept-Encoding": "identity"}}}


def _scheme(url: str) -> str:
    return url.partition("://")[0]


def _one_line(error: Exception) -> str:
    """The error's text without secrets: once cut in its middle, an address would no longer be recognized as one."""
    return " ".join(without_secrets(str(error)).split())[:_DETAIL] or type(error).__name__
