"""The two towers: each an encoder (the trunk), a way of pooling, and a head that projects into D dimensions."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.errors import InputError
from lib.towers.image_form import ImageForm

Pooling = Literal["pooler", "cls", "mean", "ready"]
HeadKind = Literal["none", "linear", "mlp"]


@dataclass(frozen=True)
class Head:
    """Form of a tower's projection into D dimensions.

    kind: "linear", "mlp" with one hidden layer of GELU units, or "none": the pooled output is the embedding.
    hidden: units of that layer; None for four times the trunk's width.
    dropout: after the hidden layer.
    bias: of a linear head; CLIP's own have none.
    """

    kind: HeadKind
    dim: int
    hidden: int | None = None
    dropout: float = 0.0
    bias: bool = True

    def build(self, width: int) -> nn.Module:
        """A head for a trunk with pooled outputs of this width; InputError for "none" if that is not D."""
        if self.kind == "none":
            if width != self.dim:
                raise InputError(
                    f"--projection-dim {self.dim}: a tower without a head gives {width} numbers; use "
                    f"--projection-dim {width}, or a linear head"
                )
            return nn.Identity()
        if self.kind == "mlp":
            hidden = self.hidden or 4 * width
            return nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Dropout(self.dropout), nn.Linear(hidden, self.dim)
            )
        linear = nn.Linear(width, self.dim, bias=self.bias)
        # Orthogonal, so that a frozen encoder below a frozen head keeps the angles that it was trained for.
        nn.init.orthogonal_(linear.weight)
        if self.bias:
            nn.init.zeros_(linear.bias)
        return linear

    def of(self, projection: nn.Module | None, name: str) -> "Head":
        """The form of the pretrained projection of a tower `name`; without one, this form of a fresh head.

        InputError where the projection does not lead into these D dimensions.
        """
        if projection is None:
            return self
        if not isinstance(projection, nn.Linear):
            return Head("none", self.dim)
        if projection.out_features != self.dim:
            raise InputError(
                f"--projection-dim {self.dim}: {name} projects into {projection.out_features} dimensions; use "
                f"--projection-dim {projection.out_features}"
            )
        return Head("linear", self.dim, bias=projection.bias is not None)


class ImageTower(nn.Module):
    """Image encoder and head.

    pooling: "pooler" is the encoder's own pooled output, "cls" its first token, "mean" the mean of its map;
        "ready" for a trunk of torchvision or timm, which returns nothing but its pooled output.
    interpolate: fit the encoder's position embeddings to another image size in every forward.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, pooling: Pooling, interpolate: bool = False):
        super().__init__()
        self.trunk, self.head, self.pooling, self.interpolate = trunk, head, pooling, interpolate
        self.patch_size = patch_size_of(trunk)
        convolutions = [module for module in trunk.modules() if isinstance(module, nn.Conv2d)]
        self.convolutional = len(convolutions) > 1
        """More than the one convolution that cuts patches."""
        if len(convolutions) == 1 and PatchEmbedding.fits(convolutions[0]):
            convolutions[0].__class__ = PatchEmbedding  # the weights stay where they are, under their names

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


class PatchEmbedding(nn.Conv2d):
    """A convolution whose patches do not overlap, as one matrix product, which it is.

    cuDNN has no good kernel for three channels: as a convolution the patches of a ViT-B/32 took a fourteenth of a step
    in bf16, and cuDNN's benchmark mode searched for seconds in every new chunk size (docs/results.md).
    """

    @staticmethod
    def fits(convolution: nn.Conv2d) -> bool:
        """The stride is the size of a patch, and every output sees one patch in all channels."""
        plain = convolution.dilation == (1, 1) and convolution.groups == 1 and convolution.padding in ((0, 0), "valid")
        return type(convolution) is nn.Conv2d and plain and convolution.stride == convolution.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        """(C, 3, H, W) -> (C, width, rows, columns)."""
        (p, q), (height, width) = self.kernel_size, input.shape[2:]
        whole = input[:, :, : height // p * p, : width // q * q]
        patches = rearrange(whole, "n c (h p) (w q) -> n h w (c p q)", p=p, q=q)
        return rearrange(F.linear(patches, self.weight.flatten(1), self.bias), "n h w d -> n d h w")


def patch_size_of(trunk: nn.Module) -> int | None:
    """Side of the patches that an image encoder takes instead of images (SigLIP 2 for any resolution), or None."""
    config = getattr(trunk, "config", None)
    return config.patch_size if config is not None and config.model_type == "siglip2_vision_model" else None


def patches(pixel_values: Tensor, patch_size: int) -> dict[str, Tensor | None]:
    """Pixels (C, 3, H, W) as the inputs of SigLIP 2's image encoder, which takes any resolution."""
    images, _, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    values = rearrange(pixel_values, "n c (h p) (w q) -> n (h w) (p q c)", p=patch_size, q=patch_size)
    return {
        "pixel_values": values,
        "pixel_attention_mask": None,  # attend to all: the encoder would read a mask of ones, and wait for the device
        # The encoder reads these as numbers, image by image; on the host that waits for nothing.
        "spatial_shapes": torch.tensor([[rows, columns]]).expand(images, 2),
    }


class TextTower(nn.Module):
    """Text encoder and head.

    pooling: "pooler" is the encoder's own pooled output, "cls" its first token, "mean" the mean over the
        tokens that are not padding.
    masked: the model takes an attention mask; SigLIP was trained without.
    """

    def __init__(self, trunk: PreTrainedModel, head: nn.Module, pooling: Pooling):
        super().__init__()
        self.trunk, self.head, self.pooling = trunk, head, pooling
        model_type = trunk.config.model_type
        self.masked = not model_type.startswith("siglip")
        # CLIP's encoder gets no mask: it pools the end token under a causal mask, where padding on the right changes
        # nothing, and a mask would cost it torch's causal attention kernel and two waits for the device.
        self.passes_mask = self.masked and model_type != "clip_text_model"

    def pooled(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """input_ids, attention_mask (C, L) -> the trunk's pooled output (C, H)."""
        output = self.trunk(input_ids=input_ids, attention_mask=attention_mask if self.passes_mask else None)
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
    """Everything that TwoTowers is built from.

    description: content of config.json.
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


def is_frozen(module: nn.Module) -> bool:
    """No parameter of the module trains."""
    return not any(parameter.requires_grad for parameter in module.parameters())
