"""Figures of retrieval: the ranks of right answers, and what they come to."""

import math

import numpy as np
import torch
from torch import Tensor

from lib.errors import InputError
from lib.evaluation.embed import require_finite
from lib.evaluation.retrieval.counting import Side, count_before, similarity_of_pairs

RECALL_AT = (1, 5, 10)


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

    A rank is 1 + the wrong candidates at least as similar: ties count against the model, so that equal embeddings for
    everything are no success. Returns int64 (images with captions,), in the order of the images, and (m,).
    """
    require_finite(image_embeds, "image")
    require_finite(text_embeds, "text")
    caption_image = torch.as_tensor(caption_image)
    if len(caption_image) == 0:
        raise InputError("no caption of the data set has a readable image; retrieval needs at least one")
    own = similarity_of_pairs(image_embeds[caption_image], text_embeds)
    best = torch.full((len(image_embeds),), torch.inf).scatter_reduce(0, caption_image, own, "amax", include_self=False)
    images = Side(image_embeds.float(), np.arange(len(image_embeds)), best.numpy())
    captions = Side(text_embeds.float(), caption_image.numpy(), own.numpy())
    before_image, before_caption = count_before(images, captions)
    return torch.from_numpy(1 + before_image)[caption_image.unique()], torch.from_numpy(1 + before_caption)


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
