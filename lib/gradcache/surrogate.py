"""What pass 2 of the cached step runs backward through: a scalar for each chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.distributed import rank_and_world_size
from lib.gradcache.first_pass import ChunkPass
from lib.losses import LossShare
from lib.towers import TowerOutput


class Surrogate:
    """The scalar whose gradient is the loss's: sum(embeds * their gradient), chunk by chunk.

    DDP averages over ranks. Each rank's tower part is its own share, so it is multiplied by W; scale and bias carry
    the full gradient on every rank already, and enter once.
    """

    def __init__(self, passes: Sequence[ChunkPass], gradients: LossShare) -> None:
        of_texts = gradients.text_embeds  # (B or the distinct texts, D), the negative texts' before them
        if gradients.negative_texts is not None:
            of_texts = torch.cat([gradients.negative_texts.to(of_texts.dtype), of_texts])
        # A chunk has no texts where they are shared and elsewhere, and no images where they are negatives.
        self.image_gradients = gradients.image_embeds.split([_rows(p.output.image_embeds) for p in passes])
        self.text_gradients = of_texts.split([_rows(p.output.text_embeds) for p in passes])
        self.d_scale, self.d_bias = gradients.logit_scale, gradients.logit_bias
        self.world_size = rank_and_world_size()[1]

    def __call__(self, index: int, output: TowerOutput, final: bool) -> Tensor:
        """`final` adds scale and bias; it is set for exactly one chunk, inside the backward that synchronizes."""
        once = float(final)
        value = once * (output.logit_scale * self.d_scale + output.logit_bias * self.d_bias)
        for embeds, gradient in (
            (output.image_embeds, self.image_gradients[index]),
            (output.text_embeds, self.text_gradients[index]),
        ):
            if embeds is not None:
                value = value + self.world_size * (embeds * gradient).sum()
        return value


def _rows(embeds: Tensor | None) -> int:
    return 0 if embeds is None else len(embeds)
