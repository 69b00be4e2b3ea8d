"""Retrieval: how high the right caption of an image, and the right image of a caption, is ranked."""

import math

import numpy as np
import torch
from torch import Tensor

from lib.errors import InputError
from lib.evaluation.embed import require_finite

RECALL_AT = (1, 5, 10)
BLOCK_ENTRIES = 1 << 22  # similarities held at a time: 32 MiB in float64


def retrieval_metrics(
    image_embeds: Tensor, text_embeds: Tensor, caption_image: Tensor | np.ndarray
) -> dict[str, dict[str, float]]:
    """Recall@1/5/10, mean reciprocal rank and median rank in both directions.

    image_embeds: (n, D); text_embeds: (m, D); caption_image: (m,) the image each caption belongs to.
    An image counts by its best-ranked own caption; images without captions are candidates only.
    """
    to_text, to_image = retrieval_ranks(image_embeds, text_embeds, caption_image)
    return {"image_to_text": summarize_ranks(to_text), "text_to_image": summarize_ranks(to_image)}


def retrieval_ranks(
    image_embeds: Tensor, text_embeds: Tensor, caption_image: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Ranks, from 1: of the first own caption of each image that has one, and of the image of each caption.

    Returns int64 (images with captions,), in the order of the images, and (m,).
    """
    require_finite(image_embeds, "image")
    require_finite(text_embeds, "text")
    caption_image = torch.as_tensor(caption_image)
    if len(caption_image) == 0:
        raise InputError("no caption of the data set has a readable image; retrieval needs at least one")
    images = torch.arange(len(image_embeds))
    captioned = caption_image.unique()
    return (
        _first_right_ranks(image_embeds[captioned], text_embeds, captioned, caption_image),
        _first_right_ranks(text_embeds, image_embeds, caption_image, images),
    )


def keep_readable(valid: Tensor, caption_image: Tensor | np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Leave unread images and their captions out.

    valid: (n,) bool. Returns the kept images (k,), the kept captions (c,), both as row numbers, and the image
    of each kept caption, numbered among the kept images (c,).
    """
    caption_image = torch.as_tensor(caption_image)
    captions = valid[caption_image].nonzero().flatten()
    renumbered = valid.cumsum(0) - 1
    return valid.nonzero().flatten(), captions, renumbered[caption_image[captions]]


def summarize_ranks(ranks: Tensor) -> dict[str, float]:
    """Fractions ranked within the first 1, 5 and 10, the mean reciprocal rank and the median rank."""
    summary = {f"R@{k}": (ranks <= k).sum().item() / len(ranks) for k in RECALL_AT}
    # Summed exactly, so that the order of the queries does not matter.
    summary["MRR"] = math.fsum(1.0 / rank for rank in ranks.tolist()) / len(ranks)
    summary["median_rank"] = float(np.median(ranks.numpy()))
    return summary


def _first_right_ranks(queries: Tensor, candidates: Tensor, query_key: Tensor, candidate_key: Tensor) -> Tensor:
    """Rank of the best candidate with the query's own key: 1 + the wrong candidates at least as similar.

    Ties count against the model, so that equal embeddings for everything are no success. Equal vectors must
    tie wherever they stand in a matrix product, hence float64 products, rounded to float32 and then compared.
    """
    candidates = candidates.double()
    ranks = []
    for rows in torch.arange(len(queries)).split(max(1, BLOCK_ENTRIES // len(candidates))):
        similarity = (queries[rows].double() @ candidates.T).float()  # (block, candidates)
        right = query_key[rows, None] == candidate_key
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + ((similarity >= best) & ~right).sum(dim=1))
    return torch.cat(ranks)
