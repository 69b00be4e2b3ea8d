"""Answers to retrieval queries, for the sheets of a report: the images of a caption, the captions of an image."""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib.data.evaluation_set import EvaluationSet, spread
from lib.evaluation.report import OpenImage
from lib.evaluation.retrieval_ranks import keep_readable

SHOWN = 5  # answers of a query
LOOKED_AT = 60  # candidates among which copies of an image are skipped

Content = TypeVar("Content", int, str)
"""An image, by its row, or a caption."""


class Matched(NamedTuple):
    """Embedded images and captions, and the image of each caption."""

    image_embeds: Tensor
    """(n, D)"""
    text_embeds: Tensor
    """(m, D)"""
    captions: list[str]
    """m captions"""
    caption_image: Tensor
    """(m,) int64, the image of each caption"""
    open_image: OpenImage
    """opens a row of image_embeds"""


def match(
    data: EvaluationSet, embeds: Tensor, valid: Tensor, text_embeds: Tensor, *, pairs: bool = False
) -> tuple[Matched, np.ndarray]:
    """Valid images with their captions, and the row in `data` of each of these images.

    embeds: (n, D) and valid: (n,) of all images; text_embeds: of the captions of valid images. pairs: an image for
    each of its captions, in place of one image with several.
    """
    texts, image_of_text = data.captioning
    images, kept, caption_image = keep_readable(valid, image_of_text)
    if pairs:
        images, caption_image = images[caption_image], torch.arange(len(kept))
    rows, captions = images.numpy(), [texts[row] for row in kept]
    matched = Matched(embeds[images], text_embeds, captions, caption_image, lambda row: data.open_image(int(rows[row])))
    return matched, rows


class Answer(NamedTuple, Generic[Content]):
    """One answer to a query."""

    content: Content
    score: float
    """cosine similarity"""
    right: bool


class TextQuery(NamedTuple):
    """A text and the images found for it, most similar first."""

    text: str
    own: Answer[int] | None
    """its image; None for a free text"""
    rank: int | None
    found: Sequence[Answer[int]]


class ImageQuery(NamedTuple):
    """An image and the captions found for it, most similar first."""

    image: int
    own: Answer[str]
    """the most similar of its captions"""
    rank: int
    found: Sequence[Answer[str]]


class Gallery:
    """Images by row; equal ones are recognized by their pixels."""

    def __init__(self, open_image: OpenImage):
        self.open = open_image
        self._digest = lru_cache(maxsize=None)(lambda row: _digest(open_image(row)))

    def same(self, first: int, second: int) -> bool:
        """True if two rows hold the same image."""
        return first == second or self._digest(first) == self._digest(second)

    def distinct(self, rows: Sequence[int], count: int) -> list[int]:
        """The first `count` rows that show different images."""
        kept: list[int] = []
        for row in rows:
            if len(kept) == count:
                break
            if not any(self.same(row, other) for other in kept):
                kept.append(row)
        return kept


def _digest(image: Image.Image) -> bytes:
    return blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()


def examples(ranks: Tensor, succeed: bool, count: int) -> list[int]:
    """Queries whose right answer is first, or is not: evenly spaced from the best rank to the worst."""
    chosen = (ranks == 1 if succeed else ranks > 1).nonzero().flatten()
    return spread(chosen[ranks[chosen].argsort(stable=True)].tolist(), count)


def text_query(matched: Matched, gallery: Gallery, caption: int, rank: int) -> TextQuery:
    """The images found for a caption."""
    embed, own = matched.text_embeds[caption], int(matched.caption_image[caption])
    found = _found_images(matched, gallery, embed, own)
    score = float(matched.image_embeds[own] @ embed)
    return TextQuery(matched.captions[caption], Answer(own, score, True), rank, found)


def free_query(matched: Matched, gallery: Gallery, text: str, embed: Tensor) -> TextQuery:
    """The images found for a text of the user's, which no image has as its caption."""
    return TextQuery(text, None, None, _found_images(matched, gallery, embed, None))


def image_query(matched: Matched, image: int, rank: int) -> ImageQuery:
    """The captions found for an image, each wording once."""
    scores = matched.text_embeds @ matched.image_embeds[image]
    own_rows = (matched.caption_image == image).nonzero().flatten()
    best = int(own_rows[scores[own_rows].argmax()])
    own_wordings = {matched.captions[row] for row in own_rows}
    found: dict[str, Answer[str]] = {}
    for row in scores.topk(min(LOOKED_AT, len(scores))).indices.tolist():
        caption = matched.captions[row]
        found.setdefault(caption, Answer(caption, float(scores[row]), caption in own_wordings))
    own = Answer(matched.captions[best], float(scores[best]), True)
    return ImageQuery(image, own, rank, list(found.values())[:SHOWN])


def candidates(matched: Matched, image: int, free: Sequence[str], free_embeds: Tensor, seed: int) -> list[Answer[str]]:
    """Captions to compare with one image: its own, the most similar wrong ones, random ones, and free texts.

    At most five of each kind and all free texts; the most similar first.
    """
    scores = matched.text_embeds @ matched.image_embeds[image]
    right = matched.caption_image == image
    order = scores.argsort(descending=True)
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(scores)))
    kinds = (order[right[order]], order[~right[order]], drawn[~right[drawn]])
    rows = [row for kind in kinds for row in kind[:SHOWN].tolist()]
    answers = {
        matched.captions[row]: Answer(matched.captions[row], float(scores[row]), bool(right[row])) for row in rows
    }
    for text, embed in zip(free, free_embeds, strict=True):
        answers.setdefault(text, Answer(text, float(embed @ matched.image_embeds[image]), False))
    return sorted(answers.values(), key=lambda answer: -answer.score)


def _found_images(matched: Matched, gallery: Gallery, embed: Tensor, own: int | None) -> list[Answer[int]]:
    scores = matched.image_embeds @ embed
    ranked = scores.topk(min(LOOKED_AT, len(scores))).indices.tolist()
    return [
        Answer(row, float(scores[row]), own is not None and gallery.same(row, own))
        for row in gallery.distinct(ranked, SHOWN)
    ]
