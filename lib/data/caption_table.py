"""The table of captioned images: every reader of captions fills it with rows, and training and evaluation use it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.evaluation_set import EvaluationSet
from lib.data.fields import SPLITS, Skips, by_split, is_utf8, of_all_splits, shown
from lib.data.find_images import ImageFinder
from lib.data.images import ImageFiles
from lib.data.load_datasets import RowImages
from lib.data.order import stable_hash
from lib.data.pairs import Captions, IndexedSource
from lib.errors import InputError


class CaptionRow(NamedTuple):
    """One row of a reader: an image and some of its captions, or the reason why the row is unusable."""

    image: str
    """as the file names it: the image's key, from which its ids are hashed"""
    captions: Sequence[str] = ()
    split: str | None = None
    """train, val, test or all, where the row has no word of its own; None: unknown"""
    split_word: str | None = None
    """the row's own word for its split, as "restval" """
    group: str | None = None
    reason: str | None = None
    line: int | None = None
    """an unusable row is counted under its line, if it has one, or else under `image`"""
    file_names: Sequence[str] = ()
    """names of the image's file, where they differ from `image`"""
    stored: int | None = None
    """number of the image in `CaptionTable.stored`, where it is no file"""


class Caption(NamedTuple):
    """One caption and its number within its image."""

    number: int
    text: str

    @property
    def fault(self) -> str | None:
        """Why it cannot be used: empty_caption, not_utf8 or None."""
        if not self.text:
            return "empty_caption"
        return None if is_utf8(self.text) else "not_utf8"


@dataclass
class Captioned:
    """An image with all its captions."""

    key: str
    """as its file names it"""
    path: str | None
    """None where the file is missing, or the image is no file"""
    split: str
    group: str | None
    captions: list[Caption]
    row: int | None = None
    """its number in `CaptionTable.stored`, where it is no file"""

    @property
    def is_there(self) -> bool:
        """True where there is an image to open."""
        return self.path is not None or self.row is not None

    @property
    def unit(self) -> str:
        """The name that images with common captions share: their group, or else the image's own key."""
        return self.group or self.key


@dataclass
class CaptionTable:
    """Captioned images by split, and the rows that cannot be used."""

    path: Path
    """the file or folder that the user named"""
    kind: str
    """for descriptions: "COCO captions" """
    flag: str
    """for errors: "--data" """
    stored: RowImages | None = None
    """the images, if they are no files"""
    has_columns: bool = False
    """True where --image-column and --caption-column choose the columns to read"""
    of_split: dict[str, dict[str, Captioned]] = field(default_factory=dict)
    """split -> key -> image, in the order of the rows"""
    skips: dict[str | None, list[tuple[str, str]]] = field(default_factory=dict)
    """split, if known -> (key, reason)"""
    unlisted: set[str] = field(default_factory=set)
    """keys of images whose rows cannot be used"""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits with images, sorted."""
        return tuple(sorted(self.of_split))

    @property
    def images(self) -> list[Captioned]:
        """The images of all splits."""
        return [image for images in self.of_split.values() for image in images.values()]

    @property
    def left_out(self) -> dict[str, Skips]:
        """(key, reason) of the unusable rows, by split."""
        return by_split(self.skips, self.of_split)

    def skip(self, key: str, reason: str, split: str | None = None) -> None:
        """Count an unusable row; `split` where it is known."""
        self.skips.setdefault(split, []).append((key, reason))

    def fill(self, rows: Iterable[CaptionRow], finder: ImageFinder | None, file: Path | None = None) -> None:
        """Add the rows of a file; those of one image may come in any order.

        file: where the rows are from, if that is a file in the folder `path`.
        Raises InputError where rows have splits, but not one that is known.
        """
        file = file or self.path
        name = str(file.relative_to(self.path)) if file.is_relative_to(self.path) and file != self.path else file.name
        unknown: CaptionRow | None = None
        for row in rows:
            split = SPLITS.get(row.split_word.lower()) if row.split_word else row.split
            fault = _fault(row, split)
            if fault is None:
                assert split is not None, "a row without a split is an unknown_split"
                self._add(row, split, finder)
                continue
            if fault == "unknown_split":
                unknown = unknown or row
            by_line = row.line is not None and fault != "not_utf8"
            self.unlisted.add(row.image)
            self.skip(f"{name}:{row.line}" if by_line else shown(row.image), fault, split)
        if unknown and not self.of_split:
            where = f"line {unknown.line}" if unknown.line is not None else f"image {shown(unknown.image)}"
            raise InputError(
                f"{self.flag} {file}, {where}: split {unknown.split_word!r} is none of {', '.join(SPLITS)}"
            )

    def _add(self, row: CaptionRow, split: str, finder: ImageFinder | None) -> None:
        images = self.of_split.setdefault(split, {})
        image = images.get(row.image)
        if image is None:
            path = finder.find(*(row.file_names or (row.image,))) if finder else None
            image = images[row.image] = Captioned(row.image, path, split, row.group, [], row.stored)
        for text in row.captions:
            # A caption is numbered before its faults are known: the number is part of its sample id.
            image.captions.append(Caption(len(image.captions), text.strip()))

    def checked(self, finder: ImageFinder) -> "CaptionTable":
        """Return the table; InputError where no row names an image, or not one of the image files is there."""
        images = self.images
        if not images:
            counts = Counter(reason for skips in self.skips.values() for _, reason in skips)
            found = "".join(f", {reason} {count:,}" for reason, count in counts.most_common())
            raise InputError(
                f"{self.flag} {self.path} names no image{found}; it needs a line for each image and caption"
            )
        if not any(image.path for image in images):
            raise InputError(
                f"{self.flag} {self.path}: of the {len(images):,} images it names not one is there (the first: "
                f"{images[0].key!r}); they are looked for in {finder.where}; --image-root says where they are"
            )
        return self

    def held_out(self, fraction: float) -> "CaptionTable":
        """Divide the single split into train, val and test; images of one group stay together."""
        images = self.images
        split_of = divided_names(sorted({image.unit for image in images}), fraction)
        of_split: dict[str, dict[str, Captioned]] = {}
        for image in images:
            split = split_of[image.unit]
            of_split.setdefault(split, {})[image.key] = replace(image, split=split)
        return replace(self, of_split=of_split, skips={None: [*of_all_splits(self.left_out)]})

    def source(self, captions: Captions) -> IndexedSource:
        """Return the training pairs: one for every caption, or one per image with a caption drawn each time."""
        split = "train" if "train" in self.splits else "all"
        rows = list(self.of_split.get(split, {}).values())
        kept = _Kept(rows, per_caption=captions != "one")
        if not kept.images:
            found = f"only {', '.join(self.splits)}"
            why = ", ".join(f"{reason} {count}" for reason, count in Counter(why for _, why in kept.skipped).items())
            reasons = f"only unusable rows ({why})" if rows else f"no rows whose split is train, {found}"
            raise InputError(f"--data {self.path} has {reasons}; nothing is left to train on")
        image = text_image = np.array(kept.text_image)
        first_text, text_count = np.arange(len(image)), np.ones_like(image)
        if captions == "one":
            image, first_text, text_count = np.unique(text_image, return_index=True, return_counts=True)
        group = kept.group
        distinct, shared = _count_texts(kept.texts, group[text_image])
        size = f"{len(kept.images):,} images, {len(kept.texts):,} captions ({captions})"
        return IndexedSource(
            where=str(self.path),
            description=f"{self.kind} {self.path}: {size}",
            size=len(image),
            distinct_texts=distinct,
            shared_text_pairs=shared,
            skipped=(*self.left_out.get(split, ()), *kept.skipped),
            images=kept.opened_from(self.stored),
            image=image,
            texts=kept.texts,
            text_number=np.array(kept.text_number),
            first_text=first_text,
            text_count=text_count,
            group=group[image],
        )

    def evaluation(self, split: str) -> EvaluationSet:
        """Return the images of one split with all their captions."""
        kept = _Kept(list(self.of_split.get(split, {}).values()), per_caption=True)
        if not kept.images:
            raise InputError(f"{self.flag} {self.path}: no row of split {split} has an image and a caption")
        path = self.path.resolve()
        return EvaluationSet(
            name=f"{path.parent.name}/{path.name} ({split})",
            images=kept.opened_from(self.stored),
            group=kept.group,
            captions=kept.texts,
            caption_image=np.array(kept.text_image),
            skipped=(*self.left_out.get(split, ()), *kept.skipped),
        )


def _fault(row: CaptionRow, split: str | None) -> str | None:
    """Return the reason why the row cannot be used, None for a good one."""
    if row.reason or split is None:
        return row.reason or "unknown_split"
    # Ids are hashed from the key and the group, and reports print them.
    return None if is_utf8(f"{row.image}{row.group or ''}") else "not_utf8"


class _Kept:
    """The usable images and captions, and the faults of the others."""

    def __init__(self, images: list[Captioned], per_caption: bool):
        """Keep images with their good captions.

        A missing file counts once, however many captions it has; a bad caption counts once where captions are pairs
        (`per_caption`), else only where its image has no good one: the counts are of pairs.
        """
        self.images: list[Captioned] = []
        self.texts: list[str] = []
        self.text_number: list[int] = []
        self.text_image: list[int] = []
        self.skipped: list[tuple[str, str]] = []
        for image in images:
            if not image.is_there or not image.captions:
                self.skipped.append((image.key, "no_text" if image.is_there else "missing"))
                continue
            faults = [(caption, fault) for caption in image.captions if (fault := caption.fault)]
            good = [caption for caption in image.captions if caption.fault is None] if faults else image.captions
            if per_caption:
                self.skipped += [(f"{image.key}#{caption.number}", fault) for caption, fault in faults]
            elif not good:
                self.skipped.append((image.key, faults[0][1]))
            if good:
                self.text_image += [len(self.images)] * len(good)
                self.texts += [caption.text for caption in good]
                self.text_number += [caption.number for caption in good]
                self.images.append(image)

    def opened_from(self, stored: RowImages | None) -> RowImages | ImageFiles:
        """Return the kept images: of the stored ones, or files."""
        if stored is not None:
            return stored.chosen([image.row for image in self.images if image.row is not None])
        paths = [image.path for image in self.images if image.path is not None]
        return ImageFiles([image.key for image in self.images], paths)

    @property
    def group(self) -> np.ndarray:
        """(images,) int64: each image is a group of its own, unless its row names another."""
        # Hashed from names, not numbered: a group keeps its id when rows are added, so that a resumed run and the
        # memory bank still recognize it.
        return np.array([stable_hash(image.unit) for image in self.images], dtype=np.int64)


def divided_names(names: list[str], fraction: float) -> dict[str, str]:
    """Hold out the fraction of the names with the smallest hashes, one half as test and one as val; the others train.

    At least one of two names is held out and two of more, and never all. By hash, not by chance: training and
    evaluation, and every later run, must hold out the same images, and a file added to the data must not move others.
    Of a smaller fraction, test and all that is held out are parts of those of a larger one.
    """
    count = min(max(2, round(fraction * len(names))), len(names) - 1)
    splits = ["test"] * ((count + 1) // 2) + ["val"] * (count // 2) + ["train"] * (len(names) - count)
    return dict(zip(sorted(names, key=stable_hash), splits, strict=True))


def _count_texts(texts: list[str], group: np.ndarray) -> tuple[int, int]:
    """Return (distinct texts, texts that occur in another group too) of M texts with their groups (M,).

    Equal 64-bit hashes count as equal texts: sorted as numbers, they take less time and memory than a set of strings.
    """
    hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
    order = hashes.argsort()
    hashes, group = hashes[order], group[order]
    del order
    first = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    several = np.minimum.reduceat(group, first) != np.maximum.reduceat(group, first)
    return len(first), int(np.diff(first, append=len(hashes))[several].sum())
