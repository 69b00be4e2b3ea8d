"""The two towers: each an encoder of transformers (the trunk), a way of pooling, and a head that projects."""

from dataclasses import dataclass
from typing import Literal

from einops import rearrange, reduce
from torch import Tensor, nn

from lib.processing import ImageForm

Pooling = Literal["pooler", "cls", "mean"]


class ImageTower(nn.Module):
    """Image encoder and head.

    pooling: "pooler" is the encoder's own pooled output, "cls" its first token, "mean" the mean of its map.
    interpolate: fit the encoder's position embeddings to another image size in every forward.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, pooling: Pooling, interpolate: bool = False):
        super().__init__()
        self.trunk, self.head = trunk, head
        self.pooling, self.interpolate = pooling, interpolate

    def pooled(self, pixel_values: Tensor) -> Tensor:
        """Normalized pixels (C, 3, H, W) -> the trunk's pooled output (C, H)."""
        if self.interpolate:
            output = self.trunk(pixel_values=pixel_values, interpolate_pos_encoding=True)
        else:
            output = self.trunk(pixel_values=pixel_values)
        if self.pooling == "pooler":
            return output.pooler_output.flatten(1)  # (C, H, 1, 1) from some convolutional networks
        if self.pooling == "cls":
            return output.last_hidden_state[:, 0]
        return reduce(output.last_hidden_state, "c h y x -> c h", "mean")


class TextTower(nn.Module):
    """Text encoder and head.

    pooling: "pooler" is the encoder's own pooled output, "cls" its first token, "mean" the mean over the
        tokens that are not padding.
    masked: whether the encoder is told which tokens are padding; SigLIP's is trained without.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, pooling: Pooling, masked: bool):
        super().__init__()
        self.trunk, self.head = trunk, head
        self.pooling, self.masked = pooling, masked

    def pooled(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """input_ids, attention_mask (C, L) -> the trunk's pooled output (C, H)."""
        output = self.trunk(input_ids=input_ids, attention_mask=attention_mask if self.masked else None)
        if self.pooling == "pooler":
            return output.pooler_output
        tokens = output.last_hidden_state
        if self.pooling == "cls":
            return tokens[:, 0]
        if attention_mask is None:
            return tokens.mean(dim=1)
        weight = rearrange(attention_mask, "c l -> c l 1").to(tokens.dtype)
        return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class Parts:
    """What TwoTowers is made of.

    description: the content of config.json.
    embed_dim: D.
    log_scale: logarithm of the logits' multiplier at the start.
    bias: the logits' summand at the start, or None for a model without one.
    pretrained_bias: the bias was trained before.
    """

    image: ImageTower
    text: TextTower
    description: dict
    embed_dim: int
    image_form: ImageForm
    log_scale: float
    bias: float | None
    pretrained_bias: bool = False
