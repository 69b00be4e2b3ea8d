"""Gradients of one step by other libraries on our towers and chunks, left on the parameters.

open_clip: its `--accum-freq` algorithm (open_clip_train/train.py) with its own ClipLoss.
sentence_transformers: its CachedMultipleNegativesRankingLoss in both directions, which is the same InfoNCE.
Each library is imported where it is used, because only one may be installed.
"""

from collections.abc import Sequence

import torch
from subjects import Autocast
from torch import Tensor, nn

from lib.data import Chunk


def open_clip_step(towers: Autocast, chunks: Sequence[Chunk]) -> None:
    """Embed all chunks; then embed each again with a graph and take the loss over all features."""
    from open_clip import ClipLoss

    loss = ClipLoss()
    on_device = [chunk.to(towers.device).inputs for chunk in chunks]  # open_clip keeps the whole batch on the device
    with torch.no_grad():
        features = [towers(**inputs) for inputs in on_device]
    images, texts = [list(parts) for parts in zip(*((f.image_embeds, f.text_embeds) for f in features), strict=True)]
    for index, inputs in enumerate(on_device):
        output = towers(**inputs)
        all_images = torch.cat([*images[:index], output.image_embeds, *images[index + 1 :]])
        all_texts = torch.cat([*texts[:index], output.text_embeds, *texts[index + 1 :]])
        loss(all_images, all_texts, output.logit_scale).backward()


def sentence_transformers_step(towers: Autocast, chunks: Sequence[Chunk]) -> None:
    """Cached loss of sentence-transformers; its scale is a constant without gradient."""
    try:
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    except ImportError:  # before version 6
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    loss = CachedMultipleNegativesRankingLoss(
        nn.Sequential(_AsSentences(towers)),
        scale=towers.towers.logit_scale.exp().item(),
        mini_batch_size=len(chunks[0]),
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    inputs = [chunk.to(towers.device).inputs for chunk in chunks]
    images = {"pixel_values": torch.cat([each["pixel_values"] for each in inputs])}
    texts = {name: torch.cat([each[name] for each in inputs]) for name in ("input_ids", "attention_mask")}
    loss([images, texts], None).backward()


class _AsSentences(nn.Module):
    """The towers as a model of sentence-transformers: a dictionary in, a dictionary with the embedding out."""

    def __init__(self, towers: Autocast) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        output = self.towers(**features)
        embedding = output.image_embeds if output.text_embeds is None else output.text_embeds
        return {"sentence_embedding": embedding}
