"""Owns captioned images once a table is read: training pairs and evaluation sets made of its rows."""

from typing import Literal

import numpy as np

from lib.data.evaluation_set import EvaluationSet
from lib.data.images import ImageFiles
from lib.data.order import stable_hash
from lib.data.pairs import IndexedSource
from lib.data.tables import Captioned, Table
from lib.errors import InputError


class _Kept:
    """The images and captions of a table that can be used, and why the others cannot."""

    def __init__(self, images: list[Captioned], per_caption: bool):
        self.images: list[Captioned] = []
        self.texts: list[str] = []
        self.text_number: list[int] = []
        self.text_image: list[int] = []
        self.skipped: list[tuple[str, str]] = []
        for image in images:
            self._add(image, per_caption)

    def _add(self, image: Captioned, per_caption: bool) -> None:
        """Keep an image with its captions; what is left out counts once a caption, or once an image."""
        good = [caption for caption in image.captions if caption.text] if image.path else []
        reason = "empty_caption" if image.path else "missing"
        if per_caption:
            left_out = (caption for caption in image.captions if caption not in good)
            self.skipped += [(f"{image.key}#{caption.number}", reason) for caption in left_out]
        elif not good:
            self.skipped.append((image.key, reason))
        if good:
            self.text_image += [len(self.images)] * len(good)
            self.texts += [caption.text for caption in good]
            self.text_number += [caption.number for caption in good]
            self.images.append(image)

    @property
    def files(self) -> ImageFiles:
        return ImageFiles([image.key for image in self.images], [image.path for image in self.images])

    @property
    def group(self) -> np.ndarray:
        """(images,) int64: the image is its own group, unless the table names another."""
        groups = [stable_hash(image.group or image.key) for image in self.images]
        return np.array(groups, dtype=np.int64)


def table_source(table: Table, captions: Literal["one", "all"]) -> IndexedSource:
    """The training rows: every caption is a pair, or every image is one with a caption drawn each time."""
    rows = [image for image in table.images if image.split == "train"]
    kept = _Kept(rows, per_caption=captions == "all")
    if not kept.images:
        reasons = f"{len(kept.skipped)} unusable rows" if rows else "no rows whose split is train"
        raise InputError(f"--data {table.path} has {reasons}; nothing is left to train on")
    text_image = np.array(kept.text_image)
    if captions == "all":
        image, first_text, text_count = text_image, np.arange(len(text_image)), np.ones_like(text_image)
    else:
        image, first_text, text_count = np.unique(text_image, return_index=True, return_counts=True)
    size = f"{len(kept.images)} images, {len(kept.texts)} captions ({captions})"
    return IndexedSource(
        where=str(table.path),
        description=f"captions {table.path}: {size}",
        size=len(image),
        distinct_texts=len(set(kept.texts)),
        skipped=tuple(table.malformed + kept.skipped),
        images=kept.files,
        image=image,
        texts=kept.texts,
        text_number=np.array(kept.text_number),
        first_text=first_text,
        text_count=text_count,
        group=kept.group[image],
    )


def table_evaluation(table: Table, split: str, flag: str) -> EvaluationSet:
    """The images of one split with all their captions."""
    kept = _Kept([image for image in table.images if image.split == split], per_caption=True)
    if not kept.images:
        raise InputError(f"{flag} {table.path}: no row of split {split} has an image and a caption")
    return EvaluationSet(
        name=f"{table.path.resolve().parent.name}/{table.path.name} ({split})",
        images=kept.files,
        group=kept.group,
        captions=kept.texts,
        caption_image=np.array(kept.text_image),
        skipped=tuple(kept.skipped),
    )
