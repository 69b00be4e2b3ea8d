"""Reading of tar files: neighbouring members with one name are a sample; every name is counted as one."""

import os
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext

from lib.data.fetcher import Fetcher, Unreachable, fault
from lib.data.find_images import IMAGE_EXTENSIONS, is_hidden
from lib.data.images import BadImage
from lib.errors import raised_as
from lib.files import open_file

IMAGE_SUFFIXES = tuple(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
TEXT_SUFFIXES = ("txt", "json", "cls")
ALL = range(sys.maxsize)
"""All samples and the damage after them."""

_SUFFIXES = IMAGE_SUFFIXES + TEXT_SUFFIXES
_TRAILING = "trailing_data"
_MOST_TEXT = 2**24  # bytes of a text member that are read


class Sample(NamedTuple):
    """The members of a tar that share a name up to their extension."""

    key: str
    members: dict
    """bytes by suffix, in lower case; of a member that is only indexed, (offset, size)"""
    fault: str | None = None
    """repeated_name: the tar has a sample of this name already; apart: image and text of a name are not neighbours"""

    @property
    def image_suffix(self) -> str | None:
        """The suffix of the image member that is used, the first of the list of suffixes; None without an image."""
        return next((suffix for suffix in IMAGE_SUFFIXES if suffix in self.members), None)

    @property
    def image(self) -> bytes | None:
        """The image's bytes, or None."""
        return self.members.get(self.image_suffix)

    @property
    def image_place(self) -> tuple[int, int] | None:
        """(offset, size) of the image where it is only indexed, or None."""
        return self.members.get(self.image_suffix)

    @property
    def complete(self) -> bool:
        """True with an image and a text for it."""
        return self.image_suffix is not None and any(suffix in self.members for suffix in TEXT_SUFFIXES)


class Damage(NamedTuple):
    """Takes the place of the next sample in a tar whose rest cannot be read."""

    reason: str
    """truncated_tar; trailing_data after the end, as in tars joined by cat; unreadable_tar for a file that is no tar or
    cannot be read; bad_gzip; or that of an Unreachable"""


def read_samples(path: str, wanted: range | frozenset[int]) -> Iterator[tuple[int, Sample | Damage]]:
    """The samples of an uncompressed tar whose numbers are wanted, with their bytes; Damage at its number.

    Of other samples only the headers are read. Only members with the suffixes above are read, and nothing is
    extracted, decoded or unpickled.
    """
    return _numbered(path, wanted, _SUFFIXES)


def index_samples(path: str) -> Iterator[Sample | Damage]:
    """All samples of an uncompressed tar, with (offset, size) of their images and the bytes of their texts."""
    return (sample for _, sample in _numbered(path, ALL, TEXT_SUFFIXES))


def index_shard(shard: str, fetcher: Fetcher) -> Iterator[Sample | Damage]:
    """As `index_samples`, of a shard that is downloaded first; Damage alone where that fails."""
    path = fetcher.reached(shard)
    return iter([Damage(path.reason)]) if isinstance(path, Unreachable) else index_samples(path)


def read_image(shard: str, place: tuple[int, int], fetcher: Fetcher) -> bytes:
    """The bytes at (offset, size) of a shard; raises BadImage.

    The fetcher is asked every time, as a downloaded shard may have been removed from the cache.
    """
    with raised_as(lambda _: BadImage("unreadable"), OSError):
        path = fetcher.reached(shard)
        if isinstance(path, Unreachable):
            raise BadImage(path.reason)
        with open_file(path) as file:
            file.seek(place[0])
            return file.read(place[1])


def _numbered(
    path: str, wanted: range | frozenset[int], suffixes: tuple[str, ...]
) -> Iterator[tuple[int, Sample | Damage]]:
    if not wanted:
        return
    last = wanted[-1] if isinstance(wanted, range) else max(wanted)
    number = 0
    try:
        with open_file(path) as file:
            for number, sample in enumerate(_samples(file, path)):
                if number > last:
                    return
                if number in wanted:
                    yield number, sample if isinstance(sample, Damage) else _loaded(file, sample, suffixes)
    except OSError:
        if number in wanted:
            yield number, Damage("unreadable_tar")


def _loaded(file: BinaryIO, sample: Sample, suffixes: tuple[str, ...]) -> Sample:
    members = dict(sample.members)
    for suffix in members.keys() & set(suffixes):
        offset, size = members[suffix]
        file.seek(offset)
        members[suffix] = file.read(min(size, _MOST_TEXT) if suffix in TEXT_SUFFIXES else size)
    return sample._replace(members=members)


def _samples(file: BinaryIO, path: str) -> Iterator[Sample | Damage]:
    """Samples, then Damage if there were faults; it replaces a last sample that lost a member."""
    faults: list[str] = []
    last = None
    for sample in _named(_neighbours(_members(file, faults))):
        if last is not None:
            yield last
        last = sample
    if last is not None and (last.complete or faults in ([], [_TRAILING])):
        yield last
    if faults:
        yield Damage(fault(path) or (faults[0] if last is not None else "unreadable_tar"))


def _named(samples: Iterator[Sample]) -> Iterator[Sample]:
    """The samples, with a fault on repeated names: a name identifies a pair, so two pairs must not share one."""
    seen: set[int] = set()
    for sample in samples:
        name = hash(sample.key)  # saves memory in tars of millions of samples
        if name in seen:
            sample = sample._replace(fault="repeated_name" if sample.complete else "apart")
        seen.add(name)
        yield sample


def _neighbours(members: Iterator[tuple[str, tuple[int, int] | None]]) -> Iterator[Sample]:
    """Group neighbouring members to samples: members that share a name up to its first dot are one run.

    A sample's name goes up to the last dot: photo.v1.jpg and photo.v2.jpg are two samples. But next to 0001.jpg,
    webdataset's convention makes 0001.seg.png a further member of sample 0001, unless it has an image and a text.
    """
    run: dict[str, list[dict]] = {}
    base = None
    for name, place in members:
        stem, suffix = _split(name)
        up_to_first_dot = base_plus_ext(name)[0] or stem
        if up_to_first_dot != base:
            yield from _of_run(run, base)
            run, base = {}, up_to_first_dot
        found = run.setdefault(stem, [{}])
        if suffix in _SUFFIXES and place is not None:
            free = next((sample for sample in found if suffix not in sample), None)
            if free is None:
                found.append(free := {})
            free[suffix] = place
    yield from _of_run(run, base)


def _split(name: str) -> tuple[str, str]:
    """The name up to its last dot, and what follows in lower case; "" where the file's own name has no dot."""
    stem, _, suffix = name.rpartition(".")
    return (stem, suffix.lower()) if stem and "/" not in suffix else (name, "")


def _of_run(run: dict[str, list[dict]], base: str | None) -> Iterator[Sample]:
    for stem, found in run.items():
        for members in found:
            sample = Sample(stem, members)
            if stem == base or base not in run or sample.complete:
                yield sample


def _members(file: BinaryIO, faults: list[str]) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """The name of every member that is no folder and not hidden, with (offset, size) of its data.

    None instead for a link or a sparse file, whose data is not stored there as it is.
    """
    length = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                stored_here = member.isreg() and not member.issparse()
                if stored_here and member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                if not member.isdir() and not is_hidden(member.name):
                    yield member.name, (member.offset_data, member.size) if stored_here else None
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header in memory
            # At a damaged or missing header tarfile stops as if the archive ended; a real end is a block of zeros.
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE or any(end):
                raise tarfile.ReadError("no end of archive")
            if any(any(block) for block in iter(partial(file.read, tarfile.RECORDSIZE), b"")):
                faults.append(_TRAILING)
    except Exception:  # damaged headers make tarfile raise errors of many types
        faults.append("truncated_tar")
