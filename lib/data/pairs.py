"""Training sources: images by number with their texts, groups and ids, and mixtures of sources."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from lib.data.images import Extent
from lib.data.order import salted, sample_id, stable_hash

Captions = Literal["all", "one", "lines"]
"""all: every caption is a pair; one: an image is, with a caption drawn each time; lines: every line of .txt is."""


class Images(Protocol):
    """Images by number, each with a key that is the same in every run."""

    @property
    def keys(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Image `index`, RGB and upright, in full or at `extent` or larger; raises BadImage."""

    def identity(self, rows: np.ndarray) -> str:
        """A text that changes when one of these images does, and else is the same in every process and run."""


class Skip(NamedTuple):
    """One unused sample: its data, its key and the reason."""

    where: str
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Description of training pairs."""

    where: str
    """The folder, table or shards, as the user named them."""
    description: str
    """One line, printed at the start."""
    size: int | None
    """Pairs in one pass; None where they would have to be read to be counted."""
    classes: tuple[str, ...] | None = None
    """Class names, where the texts are prompts."""
    templates: tuple[str, ...] | None = None
    """Prompt templates with {} for the class name."""
    distinct_texts: int | None = None
    shared_text_pairs: int | None = None
    """Captions that another group has too, word for word; None for prompts, and where they were not read."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(key, reason) of the pairs found unusable without opening an image"""
    unusable: tuple[tuple[str, str], ...] = ()
    """(key, reason) of samples known in advance that reading will count as skipped."""
    part: int | None = None
    """Number of this source in a mixture: equal keys and groups of two sources differ, except classes."""

    def sample_texts(self, limit: int = 100_000) -> list[str]:
        """At most `limit` texts of this source, to train a tokenizer on."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class IndexedSource(Source):
    """Pairs by number, P of them: pair i has image `image[i]` and draws one of `text_count[i]` texts."""

    size: int
    """Pairs in one pass, P."""
    images: Images
    image: np.ndarray
    """(P,) int64, the number of the pair's image"""
    texts: list[str]
    """all texts, M of them"""
    text_number: np.ndarray
    """(M,) int64, the caption's number within its image; zeros for prompts, which identify no sample"""
    first_text: np.ndarray
    """(P,) int64, index of the pair's first text in `texts`"""
    text_count: np.ndarray
    """(P,) int64, number of the pair's texts"""
    group: np.ndarray
    """(P,) int64"""
    image_id: np.ndarray = field(init=False)
    """(number of images,) int64, hashes of the image keys"""

    def __post_init__(self) -> None:
        hashes = (salted(stable_hash(key), self.part) for key in self.images.keys)
        ids = np.fromiter(hashes, np.int64, len(self.images))
        object.__setattr__(self, "image_id", ids)

    def sample_texts(self, limit: int = 100_000) -> list[str]:
        return list(islice(self.texts, limit))

    def key(self, pair: int) -> str:
        """Name of the pair: the image's key, and the caption's number where that is part of the pair."""
        image = self.images.keys[self.image[pair]]
        if self.templates or self.text_count[pair] > 1:
            return image
        return f"{image}#{self.text_number[self.first_text[pair]]}"

    def sample_id(self, pair: int, text: int) -> int:
        """Stable id of a pair with its drawn text."""
        return sample_id(int(self.image_id[self.image[pair]]), int(self.text_number[text]))

    def group_id(self, pair: int) -> int:
        """Group of the pair for the losses; a class is the same group in every source of a mixture."""
        group = int(self.group[pair])
        return group if self.templates else salted(group, self.part)


@dataclass(frozen=True, kw_only=True)
class MixedSource(Source):
    """Several sources: each pair is drawn from part p with probability `weights[p]`."""

    parts: tuple[Source, ...]
    weights: tuple[float, ...]
    """they sum to 1"""

    def __post_init__(self) -> None:
        merged: dict[str, object] = {
            "parts": tuple(replace(part, part=number) for number, part in enumerate(self.parts)),
            "classes": _merged(part.classes for part in self.parts),
            "templates": _merged(part.templates for part in self.parts),
            "shared_text_pairs": _sum_if_known([part.shared_text_pairs for part in self.parts]),
            "distinct_texts": _sum_if_known([part.distinct_texts for part in self.parts]),
            "skipped": tuple(chain.from_iterable(part.skipped for part in self.parts)),
            "unusable": tuple(chain.from_iterable(part.unusable for part in self.parts)),
        }
        for name, value in merged.items():
            object.__setattr__(self, name, value)

    def sample_texts(self, limit: int = 100_000) -> list[str]:
        """Texts of all parts in proportion to their weights, fewer where a part has too few."""
        shares = (int(weight * limit) + 1 for weight in self.weights)
        texts = (part.sample_texts(share) for part, share in zip(self.parts, shares, strict=True))
        return list(islice(chain.from_iterable(texts), limit))


def parts_of(source: Source) -> tuple[Source, ...]:
    """The parts of a mixture, or the source alone."""
    return source.parts if isinstance(source, MixedSource) else (source,)


def same_group_share(source: Source) -> float | None:
    """Probability that two random pairs are of one group; None where groups are not known before reading."""
    parts = [part for part in parts_of(source) if isinstance(part, IndexedSource)]
    if len(parts) < len(parts_of(source)):
        return None
    weights = source.weights if isinstance(source, MixedSource) else (1.0,)
    # Only classes are the same group in every part of a mixture.
    groups = [part.group + (0 if part.templates else part.part or 0) for part in parts]
    of_pair = [np.full(part.size, weight / part.size) for part, weight in zip(parts, weights, strict=True)]
    _, group = np.unique(np.concatenate(groups), return_inverse=True)
    return float(np.square(np.bincount(group, np.concatenate(of_pair))).sum())


def _sum_if_known(counts: list[int | None]) -> int | None:
    """The sum, or None where a count is unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _merged(names: Iterable[tuple[str, ...] | None]) -> tuple[str, ...] | None:
    """All distinct names in order, or None where a part has none."""
    merged: dict[str, None] = {}
    for of_part in names:
        if of_part is None:
            return None
        merged |= dict.fromkeys(of_part)
    return tuple(merged)


def prompted_source(
    images: Images,
    labels: np.ndarray,
    classes: tuple[str, ...],
    templates: tuple[str, ...],
    where: str,
    kind: str,
    skipped: tuple[tuple[str, str], ...] = (),
) -> IndexedSource:
    """Make a source whose texts are class prompts: every image once, with its label as group."""
    prompts = f"{len(templates)} prompt template{'s' * (len(templates) > 1)}"
    size = f"{len(images)} images, {len(classes)} classes, {prompts}"
    texts = [fill(template, name) for name in classes for template in templates]
    labels = np.asarray(labels, dtype=np.int64)
    return IndexedSource(
        where=where,
        description=f"{kind} {where}: {size}",
        size=len(images),
        classes=classes,
        templates=templates,
        distinct_texts=len(set(texts)),
        skipped=skipped,
        images=images,
        image=np.arange(len(images)),
        texts=texts,
        text_number=np.zeros(len(texts), dtype=np.int64),
        first_text=labels * len(templates),
        text_count=np.full(len(images), len(templates)),
        group=class_groups(classes)[labels],
    )


def class_groups(classes: tuple[str, ...]) -> np.ndarray:
    """Groups of the classes, (classes,) int64: a class is the same group in every source."""
    return np.array([stable_hash(name) for name in classes], dtype=np.int64)


def fill(template: str, class_name: str) -> str:
    """The prompt of a class: the template with the name in place of {}."""
    return template.replace("{}", class_name)
