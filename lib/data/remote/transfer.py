"""Owns talking to what is not a file of this machine: addresses, listing, downloads and commands, with retries."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import fsspec
from fsspec.callbacks import Callback
from fsspec.registry import known_implementations

from lib.data.order import draw
from lib.errors import InputError

ATTEMPTS = 5
BASE_DELAY = 1.0
"""Seconds before the second attempt, on average; twice as long before each further one."""

PIPE = "pipe:"
TARS = (".tar", ".tar.gz", ".tgz")
"""What the name of a shard ends with."""
ZIPPED = (".gz", ".tgz")
"""Of these, what has to be unpacked."""

_SECONDS_OF_SILENCE = 60
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# Stores of objects say "forbidden" of what is not there.
_REFUSALS = (401, 403, 404, 410)

T = TypeVar("T")


class Unreachable(Exception):
    """A shard that cannot be had; `reason` is unreachable or bad_gzip."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def is_url(data: str) -> bool:
    """Whether `data` is an address that is asked for over a network; file:// is a local path."""
    return "://" in data and not data.startswith(("file://", PIPE))


def is_away(shard: str) -> bool:
    """Whether a shard has to be brought here: an address or a command."""
    return shard.startswith(PIPE) or is_url(shard)


def remote_matches(url: str, flag: str) -> list[str]:
    """The URL itself, unasked, or what a glob in it finds; InputError, naming `flag`, where it cannot be used."""
    scheme = url.partition("://")[0]
    filesystem = _known_filesystem(url, flag)
    # Http takes "?" and "[" for parts of a name.
    if not any(letter in url for letter in ("*" if scheme in ("http", "https") else "*?[")):
        return [url]
    try:
        names = attempted(lambda: filesystem.glob(url), url)
    except (Unreachable, NotImplementedError) as error:
        detail = getattr(error, "detail", "it has no listing")
        raise InputError(f"{flag} {url}: cannot be listed ({detail}); write braces, as in 'a-{{0..9}}.tar'") from None
    if not names:
        raise InputError(f"{flag} {url}: there is no such file; check the address and the pattern")
    return [filesystem.unstrip_protocol(name) for name in names]


def read_url(url: str) -> str | None:
    """The text of a small file, or None where the remote has none; raises Unreachable."""
    try:
        return attempted(lambda: _filesystem(url).cat_file(url), url).decode("utf-8", errors="replace")
    except Unreachable as error:
        if error.__cause__ is None:
            raise
        return None


def download(url: str, path: str, attempts: int) -> None:
    """Bring a file to `path`, whole; raises Unreachable, or OSError where `path` cannot be written."""

    def get() -> None:
        told = Callback()  # learns the size that the server says
        _filesystem(url).get_file(url, path, callback=told)
        size = os.path.getsize(path)
        if told.size is not None and size != told.size:
            raise ConnectionError(f"cut short, {size} of {told.size} bytes")

    attempted(get, url, attempts)


def run_command(shard: str, path: str, attempts: int) -> None:
    """Write what pipe:COMMAND prints to `path`; raises Unreachable where it fails."""
    command = f"set -o pipefail; {shard.removeprefix(PIPE)}"

    def run() -> None:
        with open(path, "wb") as output:
            done = subprocess.run(
                ["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE
            )
        if done.returncode:
            said = done.stderr.decode("utf-8", errors="replace").strip().split("\n")[-1]
            raise ConnectionError(f"exit code {done.returncode}{': ' * bool(said)}{said}")

    attempted(run, shard, attempts)


def attempted(get: Callable[[], T], name: str, attempts: int = ATTEMPTS) -> T:
    """What `get` returns, tried again after growing pauses; raises Unreachable after the last attempt.

    What a remote says is not there or not allowed is not asked for again: that Unreachable has a cause.
    """
    told = name.partition("?")[0] if is_url(name) else name  # behind it stand keys of access
    for attempt in range(1, attempts + 1):
        try:
            return get()
        except (NotImplementedError, InputError):
            raise
        except Exception as error:  # every filesystem has errors of its own
            if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", 0) in _REFUSALS:
                raise Unreachable("unreachable", _one_line(error).replace(name, told)) from error
            if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
                raise
            detail = _one_line(error).replace(name, told)
        if attempt == attempts:
            break
        if attempt == 1:
            print(f"{told} failed ({detail}), trying again", file=sys.stderr, flush=True)
        jitter = 0.5 + draw("retry", name, os.getpid(), attempt) / 2**63
        time.sleep(BASE_DELAY * 2 ** (attempt - 1) * jitter)
    raise Unreachable("unreachable", detail)


def _filesystem(url: str) -> fsspec.AbstractFileSystem:
    scheme = url.partition("://")[0]
    if scheme not in ("http", "https"):
        return fsspec.filesystem(scheme)
    import aiohttp  # here, so that a missing package is an error of those who need it

    # aiohttp gives up on any download after five minutes; here only silence counts.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SECONDS_OF_SILENCE, sock_read=_SECONDS_OF_SILENCE)
    options = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
    return fsspec.filesystem(scheme, client_kwargs=options)


def _known_filesystem(url: str, flag: str) -> fsspec.AbstractFileSystem:
    scheme = url.partition("://")[0]
    try:
        return _filesystem(url)
    except ImportError as error:
        package = "aiohttp" if scheme in ("http", "https") else _package(scheme)
        remedy = f"needs {package}; pip install {package}" if package else _one_line(error)
        raise InputError(f"{flag} {url}: {remedy}") from None
    except ValueError:
        raise InputError(f"{flag} {url}: {scheme}:// is not known; give http, https, s3, gs or hf") from None


def _package(scheme: str) -> str | None:
    """The package that a scheme needs, as fsspec knows it."""
    package = known_implementations.get(scheme, {}).get("class", "").partition(".")[0]
    return package if package != "fsspec" else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
