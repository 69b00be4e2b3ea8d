"""Training pairs and evaluation sets, made of captioned images that were listed."""

from collections import Counter

import numpy as np

from lib.data.captions.listing import Captioned, CaptionedImages
from lib.data.evaluation_set import EvaluationSet
from lib.data.hub.row_images import RowImages
from lib.data.images import ImageFiles
from lib.data.order import stable_hash
from lib.data.pairs import Captions, Images, IndexedSource
from lib.errors import InputError


class _Kept:
    """The images and captions that can be used, and why the others cannot."""

    def __init__(self, images: list[Captioned], per_caption: bool):
        self.images: list[Captioned] = []
        self.texts: list[str] = []
        self.text_number: list[int] = []
        self.text_image: list[int] = []
        self.skipped: list[tuple[str, str]] = []
        for image in images:
            self._add(image, per_caption)

    def _add(self, image: Captioned, per_caption: bool) -> None:
        """Keep an image with its good captions.

        A missing file counts once, however many captions it has; a bad caption counts once where captions
        are pairs (`per_caption`), else only where the image has no good one.
        """
        faults = [caption.fault for caption in image.captions]
        good = [caption for caption, fault in zip(image.captions, faults, strict=True) if fault is None]
        if not image.is_there or not image.captions:
            self.skipped.append((image.key, "no_text" if image.is_there else "missing"))
            return
        if per_caption:
            numbered = zip(image.captions, faults, strict=True)
            self.skipped += [(f"{image.key}#{caption.number}", fault) for caption, fault in numbered if fault]
        elif not good:
            self.skipped.append((image.key, next(filter(None, faults))))
        if good:
            self.text_image += [len(self.images)] * len(good)
            self.texts += [caption.text for caption in good]
            self.text_number += [caption.number for caption in good]
            self.images.append(image)

    def opened_from(self, stored: RowImages | None) -> Images:
        """The images by number: of the stored ones those that are kept, or files."""
        if stored is not None:
            return stored.chosen(image.row for image in self.images if image.row is not None)
        paths = [image.path for image in self.images if image.path is not None]
        return ImageFiles([image.key for image in self.images], paths)

    @property
    def group(self) -> np.ndarray:
        """(images,) int64: the image is its own group, unless its row names another."""
        groups = [stable_hash(image.group or image.key) for image in self.images]
        return np.array(groups, dtype=np.int64)


def captioned_source(captioned: CaptionedImages, captions: Captions) -> IndexedSource:
    """The training images: every caption is a pair, or every image is one with a caption drawn each time."""
    split = "train" if "train" in captioned.splits else "all"
    rows = [image for image in captioned.images if image.split == split]
    kept = _Kept(rows, per_caption=captions != "one")
    if not kept.images:
        found = f"only {', '.join(captioned.splits)}"
        why = ", ".join(f"{reason} {count}" for reason, count in Counter(why for _, why in kept.skipped).items())
        reasons = f"only unusable rows ({why})" if rows else f"no rows whose split is train, {found}"
        raise InputError(f"--data {captioned.path} has {reasons}; nothing is left to train on")
    text_image = np.array(kept.text_image)
    if captions != "one":
        image, first_text, text_count = text_image, np.arange(len(text_image)), np.ones_like(text_image)
    else:
        image, first_text, text_count = np.unique(text_image, return_index=True, return_counts=True)
    group = kept.group
    distinct, shared = _count_texts(kept.texts, group[text_image])
    size = f"{len(kept.images):,} images, {len(kept.texts):,} captions ({captions})"
    return IndexedSource(
        where=str(captioned.path),
        description=f"{captioned.kind} {captioned.path}: {size}",
        size=len(image),
        distinct_texts=distinct,
        shared_text_pairs=shared,
        skipped=(*captioned.left_out.get(split, ()), *kept.skipped),
        images=kept.opened_from(captioned.stored),
        image=image,
        texts=kept.texts,
        text_number=np.array(kept.text_number),
        first_text=first_text,
        text_count=text_count,
        group=group[image],
    )


def _count_texts(texts: list[str], group: np.ndarray) -> tuple[int, int]:
    """(distinct texts, texts that occur in another group too) of M texts with their groups (M,).

    Equal 64-bit hashes count as equal texts: sorted as numbers, they take less time and memory than a set of strings.
    """
    hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
    order = hashes.argsort()
    hashes, group = hashes[order], group[order]
    del order
    first = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    several = np.minimum.reduceat(group, first) != np.maximum.reduceat(group, first)
    return len(first), int(np.diff(first, append=len(hashes))[several].sum())


def captioned_evaluation(captioned: CaptionedImages, split: str, flag: str) -> EvaluationSet:
    """The images of one split with all their captions."""
    kept = _Kept([image for image in captioned.images if image.split == split], per_caption=True)
    if not kept.images:
        raise InputError(f"{flag} {captioned.path}: no row of split {split} has an image and a caption")
    path = captioned.path.resolve()
    return EvaluationSet(
        name=f"{path.parent.name}/{path.name} ({split})",
        images=kept.opened_from(captioned.stored),
        group=kept.group,
        captions=kept.texts,
        caption_image=np.array(kept.text_image),
        skipped=(*captioned.left_out.get(split, ()), *kept.skipped),
    )
