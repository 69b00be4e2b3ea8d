"""Owns evaluation on tar shards: their images by number, found once and read where they lie."""

import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lib.data.annotations import Annotation, annotate_indexed, first_annotation, listed_classes, shard_names
from lib.data.evaluation_set import EvaluationSet
from lib.data.images import Extent, decode_image
from lib.data.order import stable_hash
from lib.data.shards import find_shards
from lib.data.tars import Damage, index_samples, read_member
from lib.errors import InputError


@dataclass(frozen=True)
class TarImages:
    """Images inside uncompressed tar files: image i has `places[i]`, (number of its tar, offset, size)."""

    keys: list[str]
    paths: tuple[str, ...]
    places: list[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Image `index`, RGB and upright, in full or at `extent` or larger; raises BadImage."""
        shard, offset, size = self.places[index]
        return decode_image(read_member(self.paths[shard], (offset, size)), extent)


def shard_evaluation(data: str, flag: str, templates: tuple[str, ...]) -> EvaluationSet:
    """All samples of the shards, with captions, or with labels where the first sample has no caption."""
    paths = find_shards(data, flag)
    classes = listed_classes(paths)
    captioned = bool(first_annotation(paths, classes, flag).captions)
    found = _Found([], [], [])
    for shard, (path, name) in enumerate(zip(paths, shard_names(paths), strict=True)):
        for sample in index_samples(path):
            if isinstance(sample, Damage):
                found.skipped.append((name, sample.reason))
                continue
            note = annotate_indexed(sample, path, name, classes)
            has_text = any(note.captions) if captioned else note.class_name is not None
            if sample.image is None or not has_text:
                found.skipped.append((note.key, "no_image" if sample.image is None else "no_text"))
            else:
                found.notes.append(note)
                found.places.append((shard, *sample.image))
    if not found.notes:
        raise InputError(f"{flag} {data}: no sample with an image and a text can be read")
    images = TarImages([note.key for note in found.notes], paths, found.places)
    if captioned:
        return _captioned(data, images, found)
    return _labelled(data, images, found, classes, templates)


@dataclass
class _Found:
    notes: list[Annotation]
    places: list[tuple[int, int, int]]
    skipped: list[tuple[str, str]]


def _captioned(data: str, images: TarImages, found: _Found) -> EvaluationSet:
    pairs = [(number, text) for number, note in enumerate(found.notes) for text in note.captions if text]
    return EvaluationSet(
        name=os.path.basename(data),
        images=images,
        group=np.array([stable_hash(note.group or note.key) for note in found.notes], dtype=np.int64),
        captions=[text for _, text in pairs],
        caption_image=np.array([number for number, _ in pairs], dtype=np.int64),
        skipped=tuple(found.skipped),
    )


def _labelled(
    data: str, images: TarImages, found: _Found, classes: tuple[str, ...] | None, templates: tuple[str, ...]
) -> EvaluationSet:
    names = [note.class_name for note in found.notes]
    classes = tuple(sorted(set(names))) if classes is None or not set(names) <= set(classes) else classes
    number = {name: index for index, name in enumerate(classes)}
    return EvaluationSet(
        name=os.path.basename(data),
        images=images,
        group=np.array([stable_hash(note.group or note.class_name) for note in found.notes], dtype=np.int64),
        labels=np.array([number[name] for name in names], dtype=np.int64),
        classes=classes,
        templates=templates,
        skipped=tuple(found.skipped),
    )
