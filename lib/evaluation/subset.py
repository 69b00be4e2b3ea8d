"""A part of an evaluation set, for a quick look."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from lib.data.evaluation_set import EvaluationSet
from lib.data.images import Extent
from lib.data.pairs import Images


def limited(evaluation_set: EvaluationSet, limit: int) -> EvaluationSet:
    """At most `limit` of the images, evenly spaced so that every class has its share, with their captions."""
    count = len(evaluation_set)
    if limit >= count:
        return evaluation_set
    rows = np.linspace(0, count - 1, limit).round().astype(np.int64)
    part = replace(
        evaluation_set,
        name=f"{evaluation_set.name}, {limit} of {count} images",
        images=_Chosen([evaluation_set.image_keys[row] for row in rows], evaluation_set.images, rows),
        group=evaluation_set.group[rows],
    )
    if evaluation_set.labels is not None:
        part = replace(part, labels=evaluation_set.labels[rows])
    if evaluation_set.captions is not None:
        captions, image = evaluation_set.captioning
        kept = np.flatnonzero(np.isin(image, rows))
        part = replace(part, captions=[captions[row] for row in kept], caption_image=np.searchsorted(rows, image[kept]))
    return part


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
