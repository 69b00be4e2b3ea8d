"""Owns the reading of tar files: samples as webdataset groups them, streamed or indexed, whole or damaged."""

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json", "cls")


class Sample(NamedTuple):
    """The members of a tar that share a name up to its first dot."""

    key: str
    members: dict
    """bytes by suffix, or (offset, size) where only indexed"""

    @property
    def image(self):
        """The first image member, or None."""
        return next((self.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.members), None)

    @property
    def complete(self) -> bool:
        """Whether there is an image, and text for it."""
        return self.image is not None and any(suffix in self.members for suffix in TEXT_SUFFIXES)


class Damage(NamedTuple):
    """Stands after the last sample of a tar whose rest cannot be read."""

    reason: str
    """truncated_tar, or unreadable_tar where nothing could be read at all"""


def stream_samples(path: str) -> Iterator[Sample | Damage]:
    """Read a tar from front to back: its samples with their bytes, then Damage if there was some.

    Only members with the suffixes above are read; nothing is decoded or unpickled.
    """
    faults = _missing_end(path)
    return _until_damage(_grouped(_streamed_files(path, faults)), faults)


def index_samples(path: str) -> Iterator[Sample | Damage]:
    """Samples of an uncompressed tar with (offset, size) of each member: reads the headers alone."""
    faults = _missing_end(path)
    return _until_damage(_grouped(_indexed_files(path, faults)), faults)


def read_member(path: str, place: tuple[int, int]) -> bytes:
    """The bytes at (offset, size) of a tar."""
    with open(path, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _streamed_files(path: str, faults: list[Exception]) -> Iterator[dict]:
    def note(error: Exception) -> bool:
        faults.append(error)
        return True

    try:
        with open(path, "rb") as stream:
            # Handed an open file, webdataset does not open the name, where it would run what follows "pipe:".
            opened = [{"url": path, "stream": stream}]
            yield from tar_file_expander(opened, handler=note, select_files=_wanted, eof_value=None)
    except OSError as error:
        faults.append(error)


def _indexed_files(path: str, faults: list[Exception]) -> Iterator[dict]:
    try:
        length = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isreg() and _wanted(member.name):
                    place = (member.offset_data, member.size)
                    yield {"fname": member.name, "data": place, "__url__": path}
                tar.members = []  # tarfile would keep them all
    except (OSError, tarfile.TarError) as error:
        faults.append(error)


def _missing_end(path: str) -> list[Exception]:
    """A fault where a tar lacks the 1,024 zero bytes that end one: cut between two members it looks whole."""
    try:
        with open(path, "rb") as file:
            file.seek(-1024, os.SEEK_END)
            return [tarfile.ReadError("no end of archive")] if any(file.read()) else []
    except OSError as error:
        return [error]


def _grouped(files: Iterator[dict]) -> Iterator[Sample]:
    # The handler passes over a name that comes twice in one sample: the first is kept.
    for members in group_by_keys(files, handler=lambda _: True):
        key = members.pop("__key__")
        yield Sample(key, {name: value for name, value in members.items() if not name.startswith("__")})


def _until_damage(samples: Iterator[Sample], faults: list[Exception]) -> Iterator[Sample | Damage]:
    """Put Damage after the samples if there were faults; it counts for a last sample that lost a part."""
    last = None
    for sample in samples:
        if last is not None:
            yield last
        last = sample
    if last is not None and (last.complete or not faults):
        yield last
    if faults:
        yield Damage("truncated_tar" if last is not None else "unreadable_tar")


def _wanted(name: str) -> bool:
    suffix = base_plus_ext(name)[1]
    return suffix is not None and suffix.lower() in IMAGE_SUFFIXES + TEXT_SUFFIXES
