"""The list of samples to pack, from any kind of data, with their texts and functions that read their images."""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

from lib.data.caption_table import Captioned, CaptionTable
from lib.data.fetcher import Fetcher
from lib.data.fields import of_all_splits
from lib.data.find_images import READABLE
from lib.data.images import BadImage, ImageFiles, open_header, read_image_file
from lib.data.load_datasets import RowImages
from lib.data.pairs import Images
from lib.data.recognize import OpenedData
from lib.data.shard_texts import Annotation, annotated, text_form
from lib.data.shards import SPLITS, ShardSet, shard_names
from lib.data.tars import IMAGE_SUFFIXES, Sample
from lib.data.tars import read_image as read_tar_image

_OF_FORMAT = {name: extensions[0].removeprefix(".") for name, extensions in READABLE.items()}


ReadImage = Callable[[], tuple[bytes, str]]
"""Reads an image's bytes and suffix; raises BadImage."""


def _file_image(path: str) -> tuple[bytes, str]:
    """The bytes of an image file as they are."""
    content, suffix = read_image_file(path), os.path.splitext(path)[1].lower().removeprefix(".")
    return (content, suffix) if content and suffix in IMAGE_SUFFIXES else _with_suffix(content)


def _member_image(shard: str, place: tuple[int, int], suffix: str, fetcher: Fetcher) -> tuple[bytes, str]:
    """The bytes of an image in a tar as they are."""
    content = read_tar_image(shard, place, fetcher)
    if not content:
        raise BadImage("empty")
    return content, suffix


def _held_image(images: Images, index: int) -> tuple[bytes, str]:
    """The bytes of an image in a row of a data set as they are, or an image in memory as PNG."""
    if isinstance(images, RowImages):
        content = images.content(index)
        return _with_suffix(content) if isinstance(content, bytes) else _file_image(content)
    file = io.BytesIO()
    images.open(index).save(file, "PNG")
    return file.getvalue(), "png"


def _with_suffix(content: bytes) -> tuple[bytes, str]:
    """The bytes and the suffix of their format."""
    if not content:
        raise BadImage("empty")
    return content, _OF_FORMAT.get(str(open_header(content).format), "jpg")  # MPO is a JPEG of several pictures


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample that may be packed."""

    split: str
    key: str
    group: str | None
    """text whose hash is the group of an unpacked sample; None where that is its key"""
    image: ReadImage | None
    """None where the sample cannot be used"""
    captions: tuple[str, ...] = ()
    """in their places: "" for those that cannot be used"""
    class_name: str | None = None
    faults: tuple[tuple[str, str], ...] = ()
    """(key, reason) of its unusable captions, or of the sample"""

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
    """(key, reason) of rows and shards that are no samples"""

    def digest(self) -> str:
        """A hash that changes with the list; the images' bytes do not count."""
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
            if isinstance(images, ImageFiles):
                image = partial(_file_image, images.paths[index])
            else:
                image = partial(_held_image, images, index)
            listing.entries.append(Entry(split, key, name, image, class_name=name))
    return listing


def _by_split(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: SPLITS.index(entry.split))


def _captioned(image: Captioned, stored: RowImages | None) -> Entry:
    """Make an entry; an unusable caption keeps its place, as its number is part of the others' ids."""
    faults = [(f"{image.key}#{caption.number}", caption.fault) for caption in image.captions if caption.fault]
    captions = tuple("" if caption.fault else caption.text for caption in image.captions)
    if not image.is_there or not captions:
        faults = [(image.key, "no_text" if image.is_there else "missing")]
    found: ReadImage | None = None
    if stored is not None and image.row is not None:
        found = partial(_held_image, stored, image.row)
    elif image.path is not None:
        found = partial(_file_image, image.path)
    usable = found if any(captions) else None
    return Entry(image.split, image.key, image.group, usable, captions, faults=tuple(faults))


def _of_shards(shards: ShardSet, flag: str, fetcher: Fetcher, lines: bool) -> Listing:
    listing = Listing()
    names: set[str] = set()
    for split, paths in shards.splits.items():
        form, labelled = text_form(shards, split, flag, fetcher, lines)
        for path, name in zip(paths, shard_names(paths), strict=True):
            for note, sample in annotated(path, name, form, fetcher):
                if sample is None:
                    listing.malformed += note.skipped(labelled)
                else:
                    listing.entries.append(_of_sample(note, sample, path, split, labelled, fetcher))
        if labelled:
            names.update(entry.class_name for entry in listing.entries if entry.class_name is not None)
            classes = form.classes
            listing.classes = classes if classes is not None and names <= set(classes) else tuple(sorted(names))
    return listing


def _of_sample(note: Annotation, sample: Sample, shard: str, split: str, labelled: bool, fetcher: Fetcher) -> Entry:
    read: ReadImage | None = None
    if sample.image_place is not None and note.fault(labelled) is None:
        read = partial(_member_image, shard, sample.image_place, sample.image_suffix or "", fetcher)
    return Entry(
        split,
        note.key,
        note.group or (note.class_name if labelled else None),
        read,
        () if labelled else note.captions,
        note.class_name if labelled else None,
        tuple(note.skipped(labelled)),
    )
