"""Evenly spaced samples of rows, and of the images of an evaluation set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from lib.data.evaluation_set import EvaluationSet
from lib.data.images import Extent
from lib.data.pairs import Images


def spread(rows: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """At most `count` of the rows, evenly spaced: a fair sample rather than a choice of the best."""
    if len(rows) == 0:
        return []
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [int(rows[place]) for place in places]


def limited(evaluation_set: EvaluationSet, limit: int | None) -> EvaluationSet:
    """At most `limit` of the images with their captions, evenly spaced so that every class has its share."""
    count = len(evaluation_set)
    if limit is None or limit >= count:
        return evaluation_set
    rows = np.array(spread(range(count), limit))
    subset = replace(
        evaluation_set,
        name=f"{evaluation_set.name}, {limit} of {count} images",
        images=_Chosen([evaluation_set.image_keys[row] for row in rows], evaluation_set.images, rows),
        group=evaluation_set.group[rows],
    )
    if evaluation_set.labels is not None:
        subset = replace(subset, labels=evaluation_set.labels[rows])
    if evaluation_set.captions is not None:
        captions, image = evaluation_set.captioning
        kept = np.flatnonzero(np.isin(image, rows))
        caption_image = np.searchsorted(rows, image[kept])
        subset = replace(subset, captions=[captions[row] for row in kept], caption_image=caption_image)
    return subset


@dataclass(frozen=True)
class _Chosen:
    """Some of other images, by number."""

    keys: list[str]
    images: Images
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        return self.images.open(int(self.rows[index]), extent)

    def identity(self, rows: np.ndarray) -> str:
        """Changes when one of these images does."""
        return self.images.identity(self.rows[rows])
