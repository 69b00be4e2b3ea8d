"""Evaluation on tar shards: their images by number, found once and read where they lie."""

import os
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from lib.data.evaluation_set import EvaluationSet
from lib.data.images import Extent, decode_image
from lib.data.order import stable_hash
from lib.data.remote.fetch import Fetcher, Unreachable
from lib.data.shards.annotations import Annotation, TextForm, annotate, shard_names, shown
from lib.data.shards.kind import text_form
from lib.data.shards.shard_set import ShardSet
from lib.data.shards.source import ShardSource
from lib.data.shards.tars import Damage, index_shard, read_image
from lib.errors import InputError


@dataclass(frozen=True)
class TarImages:
    """Images inside tar files: image i has `places[i]`, (number of its shard, offset, size)."""

    keys: list[str]
    shards: tuple[str, ...]
    places: list[tuple[int, int, int]]
    fetcher: Fetcher

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Image `index`, RGB and upright, in full or at `extent` or larger; raises BadImage."""
        return decode_image(self.content(index), extent)

    def content(self, index: int) -> bytes:
        """The bytes of image `index` as they are in the tar; raises BadImage."""
        shard, offset, size = self.places[index]
        return read_image(self.shards[shard], (offset, size), self.fetcher)

    def identity(self, rows: np.ndarray) -> str:
        """Changes when one of these images does: names and sizes of the shards, and where in them the images lie."""
        return repr(([_stamp(shard, self.fetcher) for shard in self.shards], [self.places[row] for row in rows]))


def shard_images(source: ShardSource) -> TarImages:
    """The images of a training source's shards; remote ones are all fetched for that."""
    found = _Found()
    for shard, (path, name) in enumerate(zip(source.shards, source.names, strict=True)):
        found.add(shard, path, name, source.form, bool(source.templates), source.fetcher)
    return TarImages([note.key for note in found.notes], source.shards, found.places, source.fetcher)


def _stamp(shard: str, fetcher: Fetcher) -> tuple:
    path = fetcher.reached(shard)
    if isinstance(path, Unreachable):
        return (shard,)
    # The time of a fetched shard is when it was last used.
    return shard, os.path.getsize(path), os.stat(path).st_mtime_ns if path == shard else 0


def shard_evaluation(
    shards: ShardSet, split: str, flag: str, templates: tuple[str, ...], fetcher: Fetcher, lines: bool = False
) -> EvaluationSet:
    """All samples of a split's shards, with captions, or with labels where `text_form` finds no captions.

    lines: each line of a .txt member is a caption.
    """
    paths = shards.splits[split]
    form, labelled = text_form(shards, split, flag, fetcher, lines)
    found = _Found()
    for shard, (path, name) in enumerate(zip(paths, shard_names(paths), strict=True)):
        found.add(shard, path, name, form, labelled, fetcher)
    if not found.notes:
        raise InputError(f"{flag} {shards.where}: no sample with an image and a text can be read")
    images = TarImages([note.key for note in found.notes], paths, found.places, fetcher)
    name = os.path.basename(shown(shards.where).rstrip("/"))
    name = name if split == "all" else f"{name} ({split})"
    if labelled:
        return _labelled(name, images, found, form.classes, templates)
    return _captioned(name, images, found)


@dataclass
class _Found:
    notes: list[Annotation] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, shard: int, path: str, name: str, form: TextForm, labelled: bool, fetcher: Fetcher) -> None:
        """Note the samples of one shard, and why others cannot be used."""
        for sample in index_shard(path, fetcher):
            if isinstance(sample, Damage):
                self.skipped.append((name, sample.reason))
                continue
            note, place = annotate(sample, name, form), sample.image_place
            self.skipped += note.skipped(place is not None, labelled)
            if place is not None and note.fault(True, labelled) is None:
                self.notes.append(note)
                self.places.append((shard, *place))


def _captioned(name: str, images: TarImages, found: _Found) -> EvaluationSet:
    pairs = [(number, text) for number, note in enumerate(found.notes) for text in note.captions if text]
    return EvaluationSet(
        name=name,
        images=images,
        group=np.array([stable_hash(note.group or note.key) for note in found.notes], dtype=np.int64),
        captions=[text for _, text in pairs],
        caption_image=np.array([number for number, _ in pairs], dtype=np.int64),
        skipped=tuple(found.skipped),
    )


def _labelled(
    name: str, images: TarImages, found: _Found, classes: tuple[str, ...] | None, templates: tuple[str, ...]
) -> EvaluationSet:
    names = [note.class_name or "" for note in found.notes]
    classes = tuple(sorted(set(names))) if classes is None or not set(names) <= set(classes) else classes
    number = {each: index for index, each in enumerate(classes)}
    return EvaluationSet(
        name=name,
        images=images,
        group=np.array([stable_hash(note.group or note.class_name) for note in found.notes], dtype=np.int64),
        labels=np.array([number[each] for each in names], dtype=np.int64),
        classes=classes,
        templates=templates,
        skipped=tuple(found.skipped),
    )
