"""TwoTowers: the one module that is trained; pixels and tokens in, unit embeddings, scale and bias out."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from lib.data.durable import check_model, save_tensors
from lib.data.pipeline import ResizeFlag
from lib.files import write_text
from lib.towers.composed import saved_pair
from lib.towers.dual import file_weights, load_dual
from lib.towers.model_files import ModelFolder, find_model, reading
from lib.towers.processing import read_settings
from lib.towers.tower import Parts, is_frozen


class TowerOutput(NamedTuple):
    """Outputs of one forward; None for a tower that was not run.

    image_embeds, text_embeds: (C, D), unit norm, float32 (float64 in a float64 model).
    logit_scale, logit_bias: (), the multiplier and the summand of the logits.
    image_pooled, text_pooled: (C, H), outputs of the trunks, inputs of the heads.
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

    logit_bias: Tensor
    image_mean: Tensor
    image_std: Tensor

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
        # cuDNN's convolutions on tensor cores want channels last, and a CPU's depthwise ones take a quarter less time;
        # they pass the order of their input on.
        order = torch.channels_last if self.image.convolutional else torch.preserve_format
        # (pixels / 255 - mean) / std, in two passes over one new tensor
        pixels = pixel_values.to(mean.dtype, memory_format=order).mul_(1 / (255 * std)).sub_(mean / std)
        return pixels.to(self.image_mean.dtype)

    @property
    def use_bias(self) -> bool:
        """The model has a trainable logit_bias."""
        return isinstance(self.logit_bias, nn.Parameter)

    @property
    def image_trunk_frozen(self) -> bool:
        """No parameter of the image trunk trains: its pooled outputs do not change."""
        return is_frozen(self.image.trunk)

    @property
    def text_trunk_frozen(self) -> bool:
        """No parameter of the text trunk trains: its pooled outputs do not change."""
        return is_frozen(self.text.trunk)

    @property
    def image_frozen(self) -> bool:
        """No parameter of the image tower trains, its head included."""
        return is_frozen(self.image)

    @property
    def text_frozen(self) -> bool:
        """No parameter of the text tower trains, its head included."""
        return is_frozen(self.text)

    def train(self, mode: bool = True) -> "TwoTowers":
        """Set the mode; modules without a parameter that trains stay in eval mode with all they hold.

        Frozen weights were trained for the batch-norm statistics that they have; and without dropout the outputs of a
        frozen trunk are the same in every epoch, so that they can be stored.
        """
        super().train(mode)
        if mode:
            _rest_where_frozen(self)
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

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors; a CLIP or SigLIP loads with transformers' AutoModel.

        state_dict: other weights than the towers' own, by the names that these have without adapters.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        if self.description["model_type"] != "two_towers":
            weights = file_weights(weights, self.description["model_type"])
        whole = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_tensors(whole, folder / "model.safetensors", {"format": "pt"})
        # SigLIP's files hold a bias in any case: only this setting tells one that trains from a constant.
        description = self.description | {"use_bias": self.use_bias}
        write_text(folder / "config.json", json.dumps(description, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, name: str | Path | ModelFolder) -> "TwoTowers":
        """Load what `save_pretrained` wrote, or a CLIP or SigLIP model, by folder or hub id, in float32."""
        return cls(load_parts(name))


def _embeds(head: nn.Module, pooled: Tensor | None) -> Tensor | None:
    return None if pooled is None else F.normalize(_at_least_float32(head(pooled)), dim=-1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _rest_where_frozen(module: nn.Module) -> None:
    for child in module.children():
        if next(child.parameters(), None) is not None and is_frozen(child):
            child.eval()
        else:
            _rest_where_frozen(child)


def load_parts(name: str | Path | ModelFolder, image_size: int | None = None, resize: ResizeFlag = "auto") -> Parts:
    """Read a model of any of our kinds, by folder or hub id; its config.json names the kind.

    image_size: another side than the model's own. resize: as in `lib.towers.image_form.measured_form`.
    """
    model = find_model("--model", name)
    check_model(model.path)
    # Weights are drawn before they are read: that must not change a caller's random state.
    with reading(model.flag, model.name), torch.random.fork_rng(devices=[]):
        settings = read_settings(model)
        if settings["model_type"] == "two_towers":
            return saved_pair(settings, load_file(model.path / "model.safetensors"), model, image_size)
        return load_dual(model, settings, image_size, resize)
