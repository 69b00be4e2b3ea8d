"""Pairs composed of an image encoder and a text encoder, each with a projection head."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lib.data.resize import ResizeFlag
from lib.errors import InputError, raised_as
from lib.image_form import DEFAULT_FORMS, ImageForm, read_image_form
from lib.towers.classifiers import SOURCES, classifier_name, load_classifier, new_classifier
from lib.towers.encoders import (
    check_and_settle,
    check_repeatable,
    load_image_encoder,
    load_text_encoder,
    new_encoder,
    reading,
    split_half,
)
from lib.towers.heads import Head
from lib.towers.pooling import image_pooling, needs_interpolation, patch_size_of, text_pooling
from lib.towers.tower import ImageTower, Parts, Pooling, TextTower


def new_pair(
    image_name: str,
    text_name: str,
    image_head: Head,
    text_head: Head,
    *,
    image_size: int | None,
    resize: ResizeFlag,
    scale: float,
    bias: float | None,
    seed: int,
) -> Parts:
    """Take two pretrained encoders and put fresh heads on them.

    image_name: a folder or hub id, also of timm's, the image half of a dual encoder as `NAME#image` with its own
        projection, or a model of `lib.towers.classifiers`.
    text_name: a folder or hub id, or `NAME#text`.
    image_size: another side than the encoder's own files name. resize: as in `lib.measured_form.measured_form`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with reading("--image-tower", image_name):
            image, form, image_settings, image_head = _load_image_tower(image_name, image_head, image_size, resize)
        with reading("--text-tower", text_name):
            text, text_head = _load_text_tower(text_name, text_head)
    description = {
        "architectures": ["TwoTowers"],
        "model_type": "two_towers",
        "image_config": image_settings,
        "image_pooling": image.pooling,
        "image_form": asdict(form),
        "text_config": _encoder_settings(text.trunk.config),
        "text_pooling": text.pooling,
        "projection": asdict(image_head),
        "text_projection": asdict(text_head),
    }
    return Parts(image, text, description, image_head.dim, form, torch.tensor(scale).log().item(), bias)


def saved_pair(settings: dict, weights: dict[str, Tensor], name: str | Path, image_size: int | None) -> Parts:
    """Build the pair that config.json describes and fill in its weights."""
    form = ImageForm.of(settings["image_form"])
    image_head = Head(**settings["projection"])
    text_head = Head(**settings.get("text_projection", settings["projection"]))  # left out where both are alike
    if settings["image_config"]["model_type"] in SOURCES:
        image_trunk = new_classifier(settings["image_config"], form.size)
    else:
        image_trunk = _all_training(new_encoder(settings["image_config"]))
    form = form.at(image_size)
    image = _image_tower(image_trunk, image_head, form.size, settings["image_pooling"], set(), name)
    text_trunk = _all_training(new_encoder(settings["text_config"]))
    text = _text_tower(text_trunk, text_head, settings["text_pooling"], set(), name)
    for part, tower in (("image.", image), ("text.", text)):
        own = {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
        tower.load_state_dict(own)
    bias = weights["logit_bias"].item() if "logit_bias" in weights else None
    description = settings | {"image_form": asdict(form)}
    description = {key: value for key, value in description.items() if not key.startswith("_")}
    log_scale = weights["logit_scale"].item()
    return Parts(image, text, description, image_head.dim, form, log_scale, bias, pretrained_bias=bool(bias))


def _all_training(trunk: PreTrainedModel) -> PreTrainedModel:
    """As transformers leaves an encoder that it loads, fixed embeddings too: a resumed run trains what it trained."""
    return trunk.requires_grad_(True)


def _load_image_tower(
    name: str, head: Head, image_size: int | None, resize: ResizeFlag
) -> tuple[ImageTower, ImageForm, dict, Head]:
    """The tower, the form of its images, what config.json says of its trunk, and the form of its head."""
    if classifier := classifier_name(name):
        trunk, form, settings = load_classifier(classifier, image_size, resize)
        return _image_tower(trunk, head, form.size, "ready", set(), name), form, settings, head
    trunk, missing, projection = load_image_encoder(name)
    default = _default_form(trunk.config)
    form = read_image_form(split_half(name)[0], default, f"--image-tower {name}", resize).at(image_size)
    if projection is not None:
        head = head.of(projection, name)
    tower = _image_tower(trunk, head, form.size, None, missing, name)
    if projection is not None:
        tower.head = projection
    return tower, form, _encoder_settings(trunk.config), head


def _load_text_tower(name: str, head: Head) -> tuple[TextTower, Head]:
    trunk, missing, projection = load_text_encoder(name)
    if projection is not None:
        head = head.of(projection, name)
    tower = _text_tower(trunk, head, text_pooling(split_half(name)[0], trunk.config), missing, name)
    if projection is not None:
        tower.head = projection
    return tower, head


@torch.enable_grad()
def _image_tower(
    trunk: nn.Module,
    head: Head,
    size: int,
    pooling: Pooling | None,
    missing: set[str],
    name: str | Path,
) -> ImageTower:
    trunk.eval()  # one image is no batch to take statistics of
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    interpolate, patch_size = needs_interpolation(trunk, size), patch_size_of(trunk)
    own = getattr(getattr(trunk, "config", None), "image_size", "its own size")
    with raised_as(
        lambda fault: InputError(f"--image-size {size}: {name} does not take it ({fault}); use {own}"),
        *(RuntimeError, ValueError, AssertionError),
    ):
        pooling = pooling or image_pooling(trunk, noise, interpolate)
        tower = ImageTower(trunk, nn.Identity(), pooling, interpolate, patch_size)
        pooled, again = tower.pooled(noise), tower.pooled(noise.expand(2, -1, -1, -1))
    check_repeatable(pooled, again, "--image-tower", name)
    check_and_settle(trunk, pooled, missing, "--image-tower", name)
    return ImageTower(trunk, head.build(pooled.shape[1]), pooling, interpolate, patch_size)


@torch.enable_grad()
def _text_tower(trunk: PreTrainedModel, head: Head, pooling: Pooling, missing: set[str], name: str | Path) -> TextTower:
    trunk.eval()
    masked = not trunk.config.model_type.startswith("siglip")
    tokens = torch.arange(4)[None]
    tower = TextTower(trunk, nn.Identity(), pooling, masked)
    pooled, again = (tower.pooled(each, torch.ones_like(each)) for each in (tokens, tokens.expand(2, -1)))
    check_repeatable(pooled, again, "--text-tower", name)
    check_and_settle(trunk, pooled, missing, "--text-tower", name)
    return TextTower(trunk, head.build(pooled.shape[1]), pooling, masked)


def _default_form(config: PretrainedConfig) -> ImageForm:
    """For an image encoder that comes without image-processor files."""
    family = config.model_type.removesuffix("_vision_model")
    form = DEFAULT_FORMS.get(family, DEFAULT_FORMS["two_towers"])
    size = getattr(config, "image_size", form.size)
    if family == "siglip2":
        size = math.isqrt(config.num_patches) * config.patch_size
    return replace(form, size=size if isinstance(size, int) else size[0])


def _encoder_settings(config: PretrainedConfig) -> dict:
    """What builds the encoder again; without where it came from and what belongs to a classifier."""
    settings = json.loads(config.to_json_string(use_diff=False))
    left_out = ("architectures", "id2label", "label2id", "problem_type")
    return {key: value for key, value in settings.items() if key not in left_out and not key.startswith("_")}
