"""A pair of toy towers with dropout, and batches for them: small enough to compare with plain autograd in float64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data import Chunk

VOCABULARY = 11


class ToyOutput(NamedTuple):
    image_embeds: Tensor | None
    text_embeds: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor
    image_pooled: Tensor | None
    text_pooled: Tensor | None


class ToyTowers(nn.Module):
    """Trunk, dropout and head per tower; called as lib.towers.TwoTowers is."""

    def __init__(self, dropout: float, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(10) if batch_norm else nn.Identity()
        self.image_trunk = nn.Sequential(nn.Linear(12, 10), norm, nn.Tanh(), nn.Dropout(dropout))
        self.text_trunk = nn.Sequential(nn.Embedding(VOCABULARY, 10), nn.Tanh(), nn.Dropout(dropout))
        self.image_head, self.text_head = (nn.Sequential(nn.Dropout(dropout), nn.Linear(10, 6)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))
        self.forwards = {"image": 0, "text": 0}
        self.double()

    def forward(
        self, pixel_values=None, input_ids=None, attention_mask=None, image_pooled=None, text_pooled=None
    ) -> ToyOutput:
        image_embeds = text_embeds = None
        if pixel_values is not None:
            self.forwards["image"] += 1
            image_pooled = self.image_trunk(pixel_values.flatten(1).double())
        if image_pooled is not None:
            image_embeds = F.normalize(self.image_head(image_pooled), dim=-1)
        if input_ids is not None:
            self.forwards["text"] += 1
            text_pooled = self.text_trunk(input_ids).mean(1)
        if text_pooled is not None:
            text_embeds = F.normalize(self.text_head(text_pooled), dim=-1)
        return ToyOutput(image_embeds, text_embeds, self.logit_scale.exp(), self.logit_bias, image_pooled, text_pooled)


def toy_chunks(count: int, chunk_size: int, groups: int | None, rank: int = 0, world_size: int = 1) -> list[Chunk]:
    """This rank's chunks of a global batch of `count` pairs, the same pairs at any number of ranks."""
    generator = torch.Generator().manual_seed(5)
    pixel_values = torch.rand(count, 3, 2, 2, generator=generator, dtype=torch.float64)
    input_ids = torch.randint(VOCABULARY, (count, 4), generator=generator)
    group = torch.randint(groups, (count,), generator=generator) if groups else torch.arange(count)
    rows = slice(rank * count // world_size, (rank + 1) * count // world_size)
    batch = (pixel_values, input_ids, torch.ones_like(input_ids), group, torch.arange(count), torch.arange(count))
    return [Chunk(*parts) for parts in zip(*(t[rows].split(chunk_size) for t in batch), strict=True)]
