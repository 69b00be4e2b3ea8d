"""Images of tar shards by number, found once and read from the tars: for evaluation and for stored outputs."""

import os
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

from lib.data.evaluation_set import EvaluationSet
from lib.data.fetcher import Fetcher, Unreachable
from lib.data.images import Extent, decode_image
from lib.data.order import stable_hash
from lib.data.shard_source import ShardSource
from lib.data.shard_texts import Annotation, TextForm, annotated, text_form
from lib.data.shards import ShardSet, shard_names, shown
from lib.data.tars import read_image
from lib.errors import InputError


@dataclass(frozen=True)
class TarImages:
    """Images inside tar files: `places[i]` is (number of its shard, offset, size)."""

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
        """The bytes of image `index`, unchanged; raises BadImage."""
        shard, offset, size = self.places[index]
        return read_image(self.shards[shard], (offset, size), self.fetcher)

    def identity(self, rows: np.ndarray) -> str:
        """Changes when one of these images does: names and sizes of the shards, and the images' places in them."""
        return repr(([self._stamp(shard) for shard in self.shards], [self.places[row] for row in rows]))

    def _stamp(self, shard: str) -> tuple:
        path = self.fetcher.reached(shard)
        if isinstance(path, Unreachable):
            return (shard,)
        # The time of a cached shard is that of its last use.
        return shard, os.path.getsize(path), os.stat(path).st_mtime_ns if path == shard else 0


@dataclass
class _Found:
    """Usable samples of the shards, with their places, and the skipped ones."""

    notes: list[Annotation] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(
        cls, shards: tuple[str, ...], names: tuple[str, ...], form: TextForm, labelled: bool, fetcher: Fetcher
    ) -> "_Found":
        found = cls()
        for number, (path, name) in enumerate(zip(shards, names, strict=True)):
            for note, sample in annotated(path, name, form, fetcher):
                found.skipped += note.skipped(labelled)
                if sample is not None and sample.image_place is not None and note.fault(labelled) is None:
                    found.notes.append(note)
                    found.places.append((number, *sample.image_place))
        return found


def shard_images(source: ShardSource) -> TarImages:
    """The images of a training source's shards; remote ones are all downloaded for that."""
    found = _Found.of(source.shards, source.names, source.form, bool(source.templates), source.fetcher)
    return TarImages([note.key for note in found.notes], source.shards, found.places, source.fetcher)


def shard_evaluation(
    shards: ShardSet, split: str, flag: str, templates: tuple[str, ...], fetcher: Fetcher, lines: bool = False
) -> EvaluationSet:
    """All samples of a split's shards, with captions, or with labels where `text_form` finds no captions.

    lines: each line of a .txt member is a caption.
    """
    paths = shards.splits[split]
    form, labelled = text_form(shards, split, flag, fetcher, lines)
    found = _Found.of(paths, shard_names(paths), form, labelled, fetcher)
    if not found.notes:
        raise InputError(f"{flag} {shards.where}: no sample with an image and a text can be read")
    images = TarImages([note.key for note in found.notes], paths, found.places, fetcher)
    name = os.path.basename(shown(shards.where).rstrip("/"))
    name = name if split == "all" else f"{name} ({split})"
    group = [stable_hash(note.group or (note.class_name if labelled else note.key)) for note in found.notes]
    make = partial(
        EvaluationSet,
        name=name,
        images=images,
        group=np.array(group, dtype=np.int64),
        skipped=tuple(found.skipped),
    )
    if not labelled:
        pairs = [(number, text) for number, note in enumerate(found.notes) for text in note.captions if text]
        caption_image = np.array([number for number, _ in pairs], dtype=np.int64)
        return make(captions=[text for _, text in pairs], caption_image=caption_image)
    names, classes = [note.class_name or "" for note in found.notes], form.classes
    classes = tuple(sorted(set(names))) if classes is None or not set(names) <= set(classes) else classes
    numbers = {each: index for index, each in enumerate(classes)}
    labels = np.array([numbers[each] for each in names], dtype=np.int64)
    return make(labels=labels, classes=classes, templates=templates)
