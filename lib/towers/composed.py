"""Pairs composed of an image encoder and a text encoder, each with a projection head."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lib.errors import InputError
from lib.processing import DEFAULT_FORMS, ImageForm, read_image_form
from lib.towers.encoders import (
    check_and_settle,
    image_pooling,
    load_image_encoder,
    load_text_encoder,
    needs_interpolation,
    new_encoder,
    reading,
    text_pooling,
)
from lib.towers.tower import ImageTower, Parts, Pooling, TextTower


@dataclass(frozen=True)
class Head:
    """The form of both towers' projections into D dimensions.

    kind: "linear", or "mlp" with one hidden layer of GELU units.
    hidden: units of that layer; None for four times the trunk's width.
    dropout: behind the hidden layer.
    """

    kind: Literal["linear", "mlp"]
    dim: int
    hidden: int | None = None
    dropout: float = 0.0

    def build(self, width: int) -> nn.Module:
        """A head for a trunk whose pooled output is this wide."""
        if self.kind == "mlp":
            hidden = self.hidden or 4 * width
            return nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Dropout(self.dropout), nn.Linear(hidden, self.dim)
            )
        linear = nn.Linear(width, self.dim)
        # Orthogonal, so that a frozen encoder below a frozen head keeps the angles that it was trained for.
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear


def new_pair(
    image_name: str,
    text_name: str,
    head: Head,
    *,
    image_size: int | None,
    scale: float,
    bias: float | None,
    seed: int,
) -> Parts:
    """Take two pretrained encoders, by folder or hub id, and put fresh heads on them.

    image_size: another side than the encoder's own files name.
    """
    with reading("--image-tower", image_name):
        image_trunk, image_missing = load_image_encoder(image_name)
        form = read_image_form(image_name, _default_form(image_trunk.config))
    form = replace(form, size=image_size or form.size)
    with reading("--text-tower", text_name):
        text_trunk, text_missing = load_text_encoder(text_name)
        text_pools = text_pooling(text_name, text_trunk.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = _image_tower(image_trunk, head, form.size, None, image_missing, image_name)
        text = _text_tower(text_trunk, head, text_pools, text_missing, text_name)
    description = {
        "architectures": ["TwoTowers"],
        "model_type": "two_towers",
        "image_config": _encoder_settings(image_trunk.config),
        "image_pooling": image.pooling,
        "image_form": asdict(form),
        "text_config": _encoder_settings(text_trunk.config),
        "text_pooling": text.pooling,
        "projection": asdict(head),
    }
    return Parts(image, text, description, head.dim, form, torch.tensor(scale).log().item(), bias)


def saved_pair(settings: dict, weights: dict[str, Tensor], name: str | Path, image_size: int | None) -> Parts:
    """Build the pair that config.json describes and fill in its weights."""
    form = ImageForm(**settings["image_form"])
    form = replace(form, size=image_size or form.size)
    head = Head(**settings["projection"])
    image_trunk, text_trunk = new_encoder(settings["image_config"]), new_encoder(settings["text_config"])
    image = _image_tower(image_trunk, head, form.size, settings["image_pooling"], set(), name)
    text = _text_tower(text_trunk, head, settings["text_pooling"], set(), name)
    for part, tower in (("image.", image), ("text.", text)):
        own = {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
        tower.load_state_dict(own)
    bias = weights["logit_bias"].item() if "logit_bias" in weights else None
    description = settings | {"image_form": asdict(form)}
    description = {key: value for key, value in description.items() if not key.startswith("_")}
    log_scale = weights["logit_scale"].item()
    return Parts(image, text, description, head.dim, form, log_scale, bias, pretrained_bias=bool(bias))


@torch.enable_grad()
def _image_tower(
    trunk: PreTrainedModel,
    head: Head,
    size: int,
    pooling: Pooling | None,
    missing: set[str],
    name: str | Path,
) -> ImageTower:
    trunk.eval()  # one blank image is no batch to take statistics of
    blank = torch.zeros(1, 3, size, size)
    interpolate = needs_interpolation(trunk, size)
    try:
        pooling = pooling or image_pooling(trunk, blank, interpolate)
        pooled = ImageTower(trunk, nn.Identity(), pooling, interpolate).pooled(blank)
    except (RuntimeError, ValueError) as error:
        own = getattr(trunk.config, "image_size", "its own size")
        raise InputError(f"--image-size {size}: {name} does not take it ({error}); use {own}") from error
    check_and_settle(trunk, pooled, missing, "--image-tower", name)
    return ImageTower(trunk, head.build(pooled.shape[1]), pooling, interpolate)


@torch.enable_grad()
def _text_tower(trunk: PreTrainedModel, head: Head, pooling: Pooling, missing: set[str], name: str | Path) -> TextTower:
    trunk.eval()
    masked = not trunk.config.model_type.startswith("siglip")
    tokens = torch.arange(4)[None]
    pooled = TextTower(trunk, nn.Identity(), pooling, masked).pooled(tokens, torch.ones_like(tokens))
    check_and_settle(trunk, pooled, missing, "--text-tower", name)
    return TextTower(trunk, head.build(pooled.shape[1]), pooling, masked)


def _default_form(config: PretrainedConfig) -> ImageForm:
    """For an image encoder that comes without image-processor files."""
    family = config.model_type.split("_")[0]
    form = DEFAULT_FORMS.get(family, DEFAULT_FORMS["two_towers"])
    size = getattr(config, "image_size", form.size)
    return replace(form, size=size if isinstance(size, int) else size[0])


def _encoder_settings(config: PretrainedConfig) -> dict:
    """What builds the encoder again; without where it came from and what belongs to a classifier."""
    settings = json.loads(config.to_json_string(use_diff=False))
    left_out = ("architectures", "id2label", "label2id", "problem_type")
    return {key: value for key, value in settings.items() if key not in left_out and not key.startswith("_")}
