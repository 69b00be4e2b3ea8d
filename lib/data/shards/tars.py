"""Owns the reading of tar files: samples as webdataset groups them, by their headers, whole or damaged."""

import os
import sys
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys

from lib.data.files import IMAGE_EXTENSIONS
from lib.data.remote.fetch import fault

IMAGE_SUFFIXES = tuple(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
TEXT_SUFFIXES = ("txt", "json", "cls")
ALL = range(sys.maxsize)
"""Every sample, and the damage after them."""

_SUFFIXES = IMAGE_SUFFIXES + TEXT_SUFFIXES


class Sample(NamedTuple):
    """The members of a tar that share a name up to its first dot."""

    key: str
    members: dict
    """bytes by suffix; of an image that is only indexed, (offset, size)"""

    @property
    def image(self) -> bytes | None:
        """The first image member, or None."""
        return next((self.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.members), None)

    @property
    def image_place(self) -> tuple[int, int] | None:
        """(offset, size) of the first image member where it is only indexed, or None."""
        return next((self.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.members), None)

    @property
    def complete(self) -> bool:
        """Whether there is an image, and text for it."""
        return self.image is not None and any(suffix in self.members for suffix in TEXT_SUFFIXES)


class Damage(NamedTuple):
    """Stands where the next sample would be in a tar whose rest cannot be read."""

    reason: str
    """truncated_tar; unreadable_tar where it is no tar at all or the disk fails; or bad_gzip"""


def read_samples(path: str, wanted: range | frozenset[int]) -> Iterator[tuple[int, Sample | Damage]]:
    """The samples of an uncompressed tar whose numbers are wanted, with their bytes; Damage at its number.

    Members of other samples are passed over by their headers; only those with the suffixes above are read, and
    nothing is extracted, decoded or unpickled.
    """
    if not wanted:
        return
    last = wanted[-1] if isinstance(wanted, range) else max(wanted)
    number = 0
    try:
        with open(path, "rb") as file:
            for number, sample in enumerate(_samples(file, path)):
                if number > last:
                    return
                if number in wanted:
                    yield number, sample if isinstance(sample, Damage) else _loaded(file, sample, _SUFFIXES)
    except OSError:
        if number in wanted:
            yield number, Damage("unreadable_tar")


def index_samples(path: str) -> Iterator[Sample | Damage]:
    """All samples of an uncompressed tar, with (offset, size) of their images and the bytes of their texts."""
    try:
        with open(path, "rb") as file:
            for sample in _samples(file, path):
                yield sample if isinstance(sample, Damage) else _loaded(file, sample, TEXT_SUFFIXES)
    except OSError:
        yield Damage("unreadable_tar")


def read_member(path: str, place: tuple[int, int]) -> bytes:
    """The bytes at (offset, size) of a tar."""
    with open(path, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _loaded(file: BinaryIO, sample: Sample, suffixes: tuple[str, ...]) -> Sample:
    members = dict(sample.members)
    for suffix in members.keys() & set(suffixes):
        offset, size = members[suffix]
        file.seek(offset)
        members[suffix] = file.read(size)
    return Sample(sample.key, members)


def _samples(file: BinaryIO, path: str) -> Iterator[Sample | Damage]:
    """Samples, then Damage if there were faults; it counts for a last sample that lost a part."""
    faults: list[Exception] = []
    last = None
    # The handler passes over a name that comes twice in one sample: the first is kept.
    for members in group_by_keys(_files(file, path, faults), handler=lambda _: True):
        if last is not None:
            yield last
        key = members.pop("__key__")
        last = Sample(key, {name: value for name, value in members.items() if not name.startswith("__")})
    if last is not None and (last.complete or not faults):
        yield last
    if faults:
        yield Damage(fault(path) or ("truncated_tar" if last is not None else "unreadable_tar"))


def _files(file: BinaryIO, path: str, faults: list[Exception]) -> Iterator[dict]:
    """The members of the kinds above, as group_by_keys takes them, with the places of their data."""
    length = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isreg() and _wanted(member.name):
                    yield {
                        "fname": member.name,
                        "data": (member.offset_data, member.size),
                        "__url__": path,
                    }
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all; its stubs hide them
            # Where a header is damaged or missing, tarfile stops as if the archive ended: an end is a block of zeros.
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE or any(end):
                raise tarfile.ReadError("no end of archive")
    except Exception as error:  # damaged headers make tarfile raise what it likes
        faults.append(error)


def _wanted(name: str) -> bool:
    suffix = base_plus_ext(name)[1]
    return suffix is not None and suffix.lower() in _SUFFIXES
