"""The list of samples to pack, of any kind of data, with their texts and where their images lie."""

import io
import os
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from lib.data.caption_table import Captioned, CaptionTable
from lib.data.fields import of_all_splits
from lib.data.find_images import READABLE
from lib.data.images import BadImage, ImageFiles, open_header, read_image_file
from lib.data.load_datasets import RowImages
from lib.data.pairs import Images
from lib.data.recognize import OpenedData
from lib.data.remote.fetch import Fetcher
from lib.data.shards.annotations import Annotation, annotate, shard_names
from lib.data.shards.index import SPLITS
from lib.data.shards.kind import text_form
from lib.data.shards.shard_set import ShardSet
from lib.data.shards.tars import IMAGE_SUFFIXES, Damage, index_shard, read_image

_OF_FORMAT = {name: extensions[0].removeprefix(".") for name, extensions in READABLE.items()}


class FileImage(NamedTuple):
    """An image that is a file."""

    path: str

    def read(self) -> tuple[bytes, str]:
        """The bytes as they are, and the suffix; raises BadImage."""
        content, suffix = read_image_file(self.path), os.path.splitext(self.path)[1].lower().removeprefix(".")
        return (content, suffix) if content and suffix in IMAGE_SUFFIXES else _with_suffix(content)


class MemberImage(NamedTuple):
    """An image in a tar."""

    shard: str
    place: tuple[int, int] | None
    """(offset, size); None where a sample has no image"""
    suffix: str
    fetcher: Fetcher

    def read(self) -> tuple[bytes, str]:
        """The bytes as they are, and the suffix; raises BadImage."""
        assert self.place is not None
        content = read_image(self.shard, self.place, self.fetcher)
        if not content:
            raise BadImage("empty")
        return content, self.suffix


def _with_suffix(content: bytes) -> tuple[bytes, str]:
    """The bytes and the suffix of their format; raises BadImage."""
    if not content:
        raise BadImage("empty")
    return content, _OF_FORMAT.get(str(open_header(content).format), "jpg")  # MPO is a JPEG of several pictures


@dataclass(frozen=True)
class HeldImage:
    """An image that is only in memory, or in a row of a data set."""

    images: Images
    index: int

    def read(self) -> tuple[bytes, str]:
        """The bytes as they are in a row, or the image as PNG, and the suffix; raises BadImage."""
        if isinstance(self.images, RowImages):
            content = self.images.content(self.index)
            return _with_suffix(content) if isinstance(content, bytes) else FileImage(content).read()
        file = io.BytesIO()
        self.images.open(self.index).save(file, "PNG")
        return file.getvalue(), "png"


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample that may be packed."""

    split: str
    key: str
    group: str | None
    """what is hashed to the group of an unpacked sample; None where that is its key"""
    image: FileImage | MemberImage | HeldImage | None
    """None where it cannot be used"""
    captions: tuple[str, ...] = ()
    """in their places: "" for those that cannot be used"""
    class_name: str | None = None
    faults: tuple[tuple[str, str], ...] = ()
    """(key, reason) of what was found unusable in it"""

    @property
    def pairs(self) -> int:
        """Captions with text, or the one pair of an image with a class."""
        return sum(map(bool, self.captions)) if self.class_name is None else 1


@dataclass
class Listing:
    """All samples in the order of the data, split by split."""

    entries: list[Entry] = field(default_factory=list)
    classes: tuple[str, ...] | None = None
    """names by number, where samples have classes"""
    malformed: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of what is no sample"""

    def digest(self) -> str:
        """Tells this list from another; images are not looked into."""
        digest = blake2b(repr((self.classes, self.malformed)).encode(), digest_size=16)
        for entry in self.entries:
            known = (entry.split, entry.key, entry.group, entry.captions, entry.class_name, entry.faults)
            digest.update(repr(known).encode())
        return digest.hexdigest()


def list_samples(opened: OpenedData, flag: str, fetcher: Fetcher, lines: bool = False) -> Listing:
    """List the samples of all splits; InputError, naming `flag`, where the data holds none that can be read.

    lines: each line of a .txt member of shards is a caption.
    """
    if isinstance(opened, CaptionTable):
        entries = [_captioned(image, opened.stored) for image in opened.images]
        return Listing(_by_split(entries), None, [*of_all_splits(opened.left_out)])
    if isinstance(opened, ShardSet):
        return _of_shards(opened, flag, fetcher, lines)
    listing = Listing(malformed=[*of_all_splits(opened.left_out)])
    for split in sorted(opened.splits, key=SPLITS.index):
        images, labels, listing.classes = opened.images(split)
        names = [listing.classes[label] for label in labels]
        for index, (key, name) in enumerate(zip(images.keys, names, strict=True)):
            image = FileImage(images.paths[index]) if isinstance(images, ImageFiles) else HeldImage(images, index)
            listing.entries.append(Entry(split, key, name, image, class_name=name))
    return listing


def _by_split(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: SPLITS.index(entry.split))


def _captioned(image: Captioned, stored: RowImages | None) -> Entry:
    """A caption that cannot be used keeps its place: its number is part of the others' ids."""
    faults = [(f"{image.key}#{caption.number}", caption.fault) for caption in image.captions if caption.fault]
    captions = tuple("" if caption.fault else caption.text for caption in image.captions)
    if not image.is_there or not captions:
        faults = [(image.key, "no_text" if image.is_there else "missing")]
    found: FileImage | HeldImage | None = None
    if stored is not None and image.row is not None:
        found = HeldImage(stored, image.row)
    elif image.path is not None:
        found = FileImage(image.path)
    usable = found if any(captions) else None
    return Entry(image.split, image.key, image.group, usable, captions, faults=tuple(faults))


def _of_shards(shards: ShardSet, flag: str, fetcher: Fetcher, lines: bool) -> Listing:
    listing = Listing()
    names: set[str] = set()
    for split, paths in shards.splits.items():
        form, labelled = text_form(shards, split, flag, fetcher, lines)
        for path, name in zip(paths, shard_names(paths), strict=True):
            for sample in index_shard(path, fetcher):
                if isinstance(sample, Damage):
                    listing.malformed.append((name, sample.reason))
                    continue
                image = MemberImage(path, sample.image_place, sample.image_suffix or "", fetcher)
                listing.entries.append(_of_sample(annotate(sample, name, form), image, split, labelled))
        if labelled:
            names.update(entry.class_name for entry in listing.entries if entry.class_name is not None)
            classes = form.classes
            listing.classes = classes if classes is not None and names <= set(classes) else tuple(sorted(names))
    return listing


def _of_sample(note: Annotation, image: MemberImage, split: str, labelled: bool) -> Entry:
    group = note.group or (note.class_name if labelled else None)
    has_image = image.place is not None
    usable = note.fault(has_image, labelled) is None
    return Entry(
        split,
        note.key,
        group,
        image if usable else None,
        () if labelled else note.captions,
        note.class_name if labelled else None,
        tuple(note.skipped(has_image, labelled)),
    )
