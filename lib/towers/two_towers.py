"""TwoTowers: the one module that is trained; pixels and tokens in, unit embeddings, scale and bias out."""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lib.errors import InputError
from lib.towers.folder import load_parts, save_folder
from lib.towers.tower import Parts

FREEZABLE = ("image", "image.trunk", "image.head", "text", "text.trunk", "text.head", "scale", "bias")


class TowerOutput(NamedTuple):
    """What one forward gives; None for a tower that was not run.

    image_embeds, text_embeds: (C, D), unit norm, float32 (float64 in a float64 model).
    logit_scale, logit_bias: (), the multiplier and the summand of the logits.
    image_pooled, text_pooled: (C, H), what the trunks gave to the heads.
    """

    image_embeds: Tensor | None
    text_embeds: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor
    image_pooled: Tensor | None
    text_pooled: Tensor | None


class TwoTowers(nn.Module):
    """An image tower and a text tower with a common embedding space.

    It starts in eval mode, as models of transformers do. `logit_scale` is the logarithm of the logits'
    multiplier; `logit_bias` is a parameter only in a model with a bias, else a constant zero.
    """

    def __init__(self, parts: Parts):
        super().__init__()
        self.image, self.text = parts.image, parts.text
        self.description = parts.description
        self.embed_dim, self.image_size = parts.embed_dim, parts.image_form.size
        self.pretrained_bias = parts.pretrained_bias
        self.logit_scale = nn.Parameter(torch.tensor(parts.log_scale))
        if parts.bias is None:
            self.register_buffer("logit_bias", torch.zeros(()), persistent=False)
        else:
            self.logit_bias = nn.Parameter(torch.tensor(float(parts.bias)))
        for name, values in (("image_mean", parts.image_form.mean), ("image_std", parts.image_form.std)):
            self.register_buffer(name, rearrange(torch.tensor(values), "c -> c 1 1"), persistent=False)
        self.eval()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_pooled: Tensor | None = None,
        text_pooled: Tensor | None = None,
    ) -> TowerOutput:
        """Embed images, texts or both; a tower without input is not run.

        pixel_values: (C, 3, H, W), uint8, normalized here; or floating point, normalized already.
        input_ids, attention_mask: (C, L) int64; without a mask every token counts.
        image_pooled, text_pooled: (C, H) trunk outputs of an earlier pass, given instead: only the head runs.
        """
        if pixel_values is not None:
            image_pooled = self.image.pooled(self._normalized(pixel_values))
        if input_ids is not None:
            text_pooled = self.text.pooled(input_ids, attention_mask)
        return TowerOutput(
            image_embeds=_embeds(self.image.head, image_pooled),
            text_embeds=_embeds(self.text.head, text_pooled),
            logit_scale=_at_least_float32(self.logit_scale).exp(),
            logit_bias=_at_least_float32(self.logit_bias),
            image_pooled=image_pooled,
            text_pooled=text_pooled,
        )

    def _normalized(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.is_floating_point():
            return pixel_values
        mean, std = _at_least_float32(self.image_mean), _at_least_float32(self.image_std)
        # (pixels / 255 - mean) / std, in two passes over one new tensor
        pixels = pixel_values.to(mean.dtype).mul_(1 / (255 * std)).sub_(mean / std)
        return pixels.to(self.image_mean.dtype)

    @property
    def use_bias(self) -> bool:
        """Whether the model has a trainable logit_bias."""
        return isinstance(self.logit_bias, nn.Parameter)

    @property
    def image_trunk_frozen(self) -> bool:
        """No parameter of the image trunk trains: its pooled output stays what it is."""
        return _is_frozen(self.image.trunk)

    @property
    def text_trunk_frozen(self) -> bool:
        """No parameter of the text trunk trains: its pooled output stays what it is."""
        return _is_frozen(self.text.trunk)

    @property
    def image_frozen(self) -> bool:
        """No parameter of the image tower trains, its head included."""
        return _is_frozen(self.image)

    @property
    def text_frozen(self) -> bool:
        """No parameter of the text tower trains, its head included."""
        return _is_frozen(self.text)

    def freeze(self, what: Sequence[str]) -> None:
        """Stop training the named parts, any of `FREEZABLE`; a frozen trunk stays in eval mode."""
        for name in what:
            for parameter in self._part(name):
                parameter.requires_grad_(False)
        self.train(self.training)

    def _part(self, name: str) -> list[nn.Parameter]:
        if name not in FREEZABLE:
            nearest = difflib.get_close_matches(name, FREEZABLE, n=1, cutoff=0.0)[0]
            raise InputError(f"--freeze {name}: no such part, the nearest is {nearest}; all are {', '.join(FREEZABLE)}")
        if name == "scale":
            return [self.logit_scale]
        if name == "bias":
            return [self.logit_bias] if self.use_bias else []
        parameters = list(self.get_submodule(name).parameters())
        if not parameters:
            tower = name.split(".")[0]
            raise InputError(f"--freeze {name}: this model's {tower} tower has no head; use --freeze {tower}")
        return parameters

    def train(self, mode: bool = True) -> "TwoTowers":
        """Set the mode; frozen parts stay in eval mode: no dropout, batch-norm statistics as they are."""
        super().train(mode)
        for part in (self.image.trunk, self.image.head, self.text.trunk, self.text.head):
            if mode and _is_frozen(part):
                part.eval()
        return self

    @torch.no_grad()
    def set_scale_and_bias(self, scale: float | None, bias: float | None) -> None:
        """Put new values in place: scale is the multiplier itself; None leaves a value as it is."""
        if scale is not None:
            self.logit_scale.fill_(math.log(scale))
        if bias is not None:
            if not self.use_bias:
                raise ValueError("this model has no logit_bias: load it with use_bias=True")
            self.logit_bias.fill_(bias)

    @torch.no_grad()
    def clamp_logit_scale(self, max_scale: float) -> None:
        """Keep the multiplier at or below max_scale (100 in CLIP, Radford et al. 2021, section 2.5)."""
        self.logit_scale.clamp_(max=math.log(max_scale))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; a CLIP or SigLIP loads with transformers' AutoModel."""
        # SigLIP's files hold a bias in any case: only a word says whether it is one that trains.
        save_folder(Path(folder), self.description | {"use_bias": self.use_bias}, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder_or_id: str | Path) -> "TwoTowers":
        """Load what `save_pretrained` wrote, or a CLIP or SigLIP model by folder or hub id, in float32."""
        return cls(load_parts(folder_or_id))


def _embeds(head: nn.Module, pooled: Tensor | None) -> Tensor | None:
    return None if pooled is None else F.normalize(_at_least_float32(head(pooled)), dim=-1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())
