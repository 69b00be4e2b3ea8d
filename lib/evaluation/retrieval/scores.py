"""Similarities behind the ranks: of matched and unmatched pairs, and the margin between right and best wrong answer."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.evaluation.drawing import OpenImage, spread
from lib.evaluation.retrieval.counting import rounding_of_products, similarity_of_pairs

BLOCK_ENTRIES = 1 << 22  # similarities held at a time
MOST_MARGINS = 5000  # queries of a direction: more make the same histogram


class Matched(NamedTuple):
    """Images and captions, embedded, and which belong together."""

    image_embeds: Tensor
    """(n, D)"""
    text_embeds: Tensor
    """(m, D)"""
    captions: list[str]
    """m of them"""
    caption_image: Tensor
    """(m,) int64, the image of each caption"""
    open_image: OpenImage
    """a picture by row of image_embeds"""


def matched_similarities(matched: Matched) -> np.ndarray:
    """Similarity of each caption to its image, (m,)."""
    return similarity_of_pairs(matched.image_embeds[matched.caption_image], matched.text_embeds).numpy()


def unmatched_similarities(matched: Matched, seed: int) -> np.ndarray:
    """Similarity of each caption to one other image, drawn at random, (m,); empty where there is no other."""
    images, caption_image = len(matched.image_embeds), matched.caption_image
    if images == 1:
        return np.zeros(0, np.float32)
    generator = torch.Generator().manual_seed(seed)
    other = (caption_image + torch.randint(1, images, caption_image.shape, generator=generator)) % images
    return similarity_of_pairs(matched.image_embeds[other], matched.text_embeds).numpy()


def margins(matched: Matched) -> dict[str, np.ndarray]:
    """By direction: similarity of the best right answer less that of the best wrong one, of evenly spaced queries.

    At most 5,000 of a direction; above 0 is a success at rank 1. Empty where nothing is wrong.
    """
    images, texts, caption_image = matched.image_embeds, matched.text_embeds, matched.caption_image
    own = torch.arange(len(images))
    captioned = torch.tensor(spread(caption_image.unique(), MOST_MARGINS))
    asked = torch.tensor(spread(range(len(texts)), MOST_MARGINS))
    return {
        "image_to_text": _margins(images[captioned], texts, captioned, caption_image),
        "text_to_image": _margins(texts[asked], images, caption_image[asked], own),
    }


def _margins(queries: Tensor, candidates: Tensor, query_key: Tensor, candidate_key: Tensor) -> np.ndarray:
    found = []
    for rows in torch.arange(len(queries)).split(max(1, BLOCK_ENTRIES // len(candidates))):
        similarity = queries[rows] @ candidates.T  # (block, candidates)
        right = query_key[rows, None] == candidate_key
        best_right = similarity.masked_fill(~right, -torch.inf).amax(dim=1)
        best_wrong = similarity.masked_fill_(right, -torch.inf).amax(dim=1)
        found.append((best_right - best_wrong).numpy())
    together = np.concatenate(found)
    together[np.abs(together) <= rounding_of_products(queries, candidates)] = 0  # a tie, which is no success
    return together[np.isfinite(together)]
