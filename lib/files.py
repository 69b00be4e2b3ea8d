"""Files and addresses: opening a regular file, and writing and printing text without passwords and tokens."""

import codecs
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

HIDDEN = "***"

# Texts of JSON are read too: there \" is a letter of the address, and \n its end.
_ESCAPED, _END = r"\\[\\\"]", r"\\[nrt]"
_LETTER = rf'(?:{_ESCAPED}|(?!{_ESCAPED}|{_END})[^\s"<>])'
# A path of pathlib has one slash in place of two.
_START = r":/(?:/|(?<=http:/)|(?<=https:/)|(?<=s3:/)|(?<=gs:/))"
# The @ of a path, as of hf://, ends no password; one with a slash or question mark in it looks like no port.
_USER = (
    rf'(?:{_ESCAPED}|(?!{_ESCAPED}|{_END})[^\s"/?#])*@'
    rf'|[^\s"<>/?#@:\\]*:(?!\d*(?:[/?#\s"<>]|$)){_LETTER}*?@'
)
# Marks of the sentence that the address stands in are no part of it.
_QUERY = rf"\?(?!\*\*\*)(?![),.;:\]}}']){_LETTER}+?(?=[),.;:\]}}']*(?:{_END}|[\s\"<>]|$))"
_ADDRESS = re.compile(rf"({_START})({_USER})?((?:(?!\?){_LETTER})*)({_QUERY})?")
_SHARD = re.compile(rf"(?:(?<=\.tar)|(?<=\.tgz)|(?<=\.tar\.gz)){_QUERY}")


def without_secrets(text: str) -> str:
    """Replace user names, passwords and query strings in addresses by ***.

    An address contains ://, or is the name of a tar followed by a question mark. Other text stays the same.
    """
    if ":/" in text:
        text = _ADDRESS.sub(_hidden, text)
    return _SHARD.sub(f"?{HIDDEN}", text) if "?" in text else text


def json_without_secrets(value: object) -> Any:
    """A JSON value with all of its texts `without_secrets`, as a file contains it."""
    return json.loads(without_secrets(json.dumps(value)))


def _hidden(address: re.Match[str]) -> str:
    start, user, path, query = address.groups()
    return start + f"{HIDDEN}@" * bool(user) + path + f"?{HIDDEN}" * bool(query)


def hide_secrets_in_output() -> None:
    """Pass everything written to stdout and stderr through `without_secrets`, in this process and its children.

    The streams stay the same objects, so loggers and progress bars that hold them are included.
    """
    for stream in (sys.stdout, sys.stderr):
        if "write" not in vars(stream):
            stream.write = partial(_write_hidden, stream.write)  # type: ignore[method-assign]


def _write_hidden(write: Callable[[str], int], text: str) -> int:
    return write(without_secrets(text))


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a file as UTF-8, whole or not at all, without the secrets of addresses.

    private: keep the secrets, and let only the owner read the file.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        with _named(path):
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text if private else without_secrets(text))
                file.flush()
                os.fsync(descriptor)
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file, as UTF-8, without the secrets of addresses."""
    with _named(path), open(path, "a", encoding="utf-8") as file:
        file.write(without_secrets(text))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file's name to write errors: the operating system omits it when a disk is full."""
    try:
        yield
    except OSError as fault:
        if fault.errno and fault.filename is None:
            fault.filename = str(path)
        raise


class NotAFile(OSError):
    """A FIFO, a device, a socket or a folder where a file is expected."""


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file to read its bytes; raises NotAFile for anything else, which could block for ever.

    Raises OSError as open does, also for names that no file can have (with a NUL).
    """
    try:
        # Without O_NONBLOCK opening a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as fault:
        raise FileNotFoundError(str(fault)) from fault
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFile(f"{os.fspath(path)!r} is not a regular file")
    return os.fdopen(descriptor, "rb")


def open_text(path: str | os.PathLike) -> TextIO:
    """Open a regular file as text: UTF-16 with a byte order mark, else UTF-8, whose bad bytes become surrogates.

    A line ends where the file's first line does, at a line feed or, in files of old Macs, at a carriage return: the
    other one is a character like any. Raises OSError as `open_file` does.
    """
    file = open_file(path)
    start = file.read(2**16)
    file.seek(0)
    newline = "\r" if b"\r" in start and b"\n" not in start else "\n"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.TextIOWrapper(file, encoding="utf-16", errors="replace", newline=newline)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def fault_of(error: Exception) -> str:
    """The operating system's words for an error, or our own."""
    return getattr(error, "strerror", None) or str(error)


def decode(content: bytes) -> str:
    """UTF-8 text, without a byte order mark before it; raises UnicodeDecodeError."""
    return content.decode("utf-8-sig")
