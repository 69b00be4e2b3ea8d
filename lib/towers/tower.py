"""The two towers: each an encoder (the trunk), a way of pooling, and a head that projects."""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from lib.towers.image_form import ImageForm

Pooling = Literal["pooler", "cls", "mean", "ready"]


class ImageTower(nn.Module):
    """Image encoder and head.

    pooling: "pooler" is the encoder's own pooled output, "cls" its first token, "mean" the mean of its map;
        "ready" for a trunk of torchvision or timm, which gives nothing but its pooled output.
    interpolate: fit the encoder's position embeddings to another image size in every forward.
    patch_size: side of the patches that the encoder takes instead of images, or None.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        pooling: Pooling,
        interpolate: bool = False,
        patch_size: int | None = None,
    ):
        super().__init__()
        self.trunk, self.head, self.pooling = trunk, head, pooling
        self.interpolate, self.patch_size = interpolate, patch_size
        self.convolutional = sum(isinstance(module, nn.Conv2d) for module in trunk.modules()) > 1
        """More than the one convolution that cuts patches."""

    def pooled(self, pixel_values: Tensor) -> Tensor:
        """Normalized pixels (C, 3, H, W) -> the trunk's pooled output (C, H).

        In eval mode a convolutional trunk computes in float32 where autocast asks for bfloat16: the rounding in each of
        its layers changed R@1 by more than a point, that of transformers by a tenth (docs/results.md).
        """
        device = pixel_values.device.type
        if self.training or not self.convolutional or not torch.is_autocast_enabled(device):
            return self._pooled(pixel_values)
        with torch.autocast(device, enabled=torch.get_autocast_dtype(device) != torch.bfloat16):
            return self._pooled(pixel_values)

    def _pooled(self, pixel_values: Tensor) -> Tensor:
        if self.pooling == "ready":
            return self.trunk(pixel_values).flatten(1)
        if self.interpolate:
            output = self.trunk(pixel_values=pixel_values, interpolate_pos_encoding=True)
        elif self.patch_size:
            output = self.trunk(**patches(pixel_values, self.patch_size))
        else:
            output = self.trunk(pixel_values=pixel_values)
        if self.pooling == "pooler":
            return output.pooler_output.flatten(1)  # (C, H, 1, 1) from some convolutional networks
        if self.pooling == "cls":
            return output.last_hidden_state[:, 0]
        return reduce(output.last_hidden_state, "c h y x -> c h", "mean")


def patches(pixel_values: Tensor, patch_size: int) -> dict[str, Tensor | None]:
    """Pixels (C, 3, H, W) as the inputs of SigLIP 2's image encoder, which takes any resolution."""
    images, _, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    values = rearrange(pixel_values, "n c (h p) (w q) -> n (h w) (p q c)", p=patch_size, q=patch_size)
    return {
        "pixel_values": values,
        "pixel_attention_mask": None,  # all of them: a mask of ones would be read, which waits for the device
        # read as numbers, image by image: on the host that waits for nothing
        "spatial_shapes": torch.tensor([[rows, columns]]).expand(images, 2),
    }


class TextTower(nn.Module):
    """Text encoder and head.

    pooling: "pooler" is the encoder's own pooled output, "cls" its first token, "mean" the mean over the
        tokens that are not padding.
    masked: whether padding is told to the encoder; SigLIP's is trained without. CLIP's own is not told here: it pools
        the end token under a causal mask, where padding on the right changes nothing, and a mask would cost it torch's
        causal attention kernel and two waits for the device.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, pooling: Pooling, masked: bool):
        super().__init__()
        self.trunk, self.head = trunk, head
        self.pooling, self.masked = pooling, masked
        model_type = getattr(getattr(trunk, "config", None), "model_type", None)
        self.tells_padding = masked and model_type != "clip_text_model"

    def pooled(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """input_ids, attention_mask (C, L) -> the trunk's pooled output (C, H)."""
        output = self.trunk(input_ids=input_ids, attention_mask=attention_mask if self.tells_padding else None)
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
