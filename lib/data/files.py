"""Files that data consists of: which names are images, which names are hidden, and opening what is surely a file."""

import codecs
import io
import os
import stat
from contextlib import AbstractContextManager
from typing import BinaryIO, TextIO

from lib.errors import InputError, raised_as

READABLE = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
}
"""Pillow's formats that are read, each with its file extensions, the usual one first."""

UNREADABLE = (".heic", ".heif", ".hif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw")
"""Extensions of images that Pillow cannot read: such files are counted and skipped, not overlooked."""

IMAGE_EXTENSIONS = (*(extension for extensions in READABLE.values() for extension in extensions), *UNREADABLE)
"""Every extension of an image, for folders, tables and tars alike; compare in lower case."""


def is_image_name(name: str) -> bool:
    """Whether the name is that of an image file, readable or not, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether the file's own name begins with a dot, as .DS_Store and ._photo.jpg of macOS: never part of the data."""
    return name.rpartition("/")[2].startswith(".")


class NotAFile(OSError):
    """A FIFO, a device, a socket or a folder where a file is expected."""


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file to read its bytes; raises NotAFile for anything else, which could block for ever.

    Raises OSError as open does, also for names that no file can have (with a NUL).
    """
    with raised_as(lambda fault: FileNotFoundError(str(fault)), ValueError):
        # Without O_NONBLOCK opening a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
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


def readable(asked: str) -> AbstractContextManager[None]:
    """A context whose faults of the file system are an InputError: `asked`, as "--data a.csv", cannot be read."""
    return raised_as(lambda fault: InputError(f"{asked} cannot be read: {fault_of(fault)}"), OSError)
