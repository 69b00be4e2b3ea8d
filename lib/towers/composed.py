"""Pairs composed of an image encoder and a text encoder, each with a projection head."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lib.data.pipeline import ResizeFlag
from lib.errors import InputError, raised_as
from lib.towers.classifiers import SOURCES, is_classifier, is_timm, load_classifier, new_classifier
from lib.towers.encoders import (
    check_and_settle,
    check_repeatable,
    find_half,
    image_pooling,
    load_image_encoder,
    load_text_encoder,
    needs_interpolation,
    new_encoder,
    patch_size_of,
    text_pooling,
)
from lib.towers.heads import Head
from lib.towers.image_form import DEFAULT_FORMS, ImageForm, read_image_form
from lib.towers.model_files import ModelFolder, is_open_clip, reading
from lib.towers.processing import read_settings
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
    image_size: another side than the encoder's own files name. resize: as in `lib.towers.measured_form.measured_form`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image, form, image_settings, image_head = _load_image_tower(image_name, image_head, image_size, resize)
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


def saved_pair(settings: dict, weights: dict[str, Tensor], model: ModelFolder, image_size: int | None) -> Parts:
    """Build the pair that config.json describes and fill in its weights."""
    form = ImageForm.of(settings["image_form"])
    image_head = Head(**settings["projection"])
    text_head = Head(**settings.get("text_projection", settings["projection"]))  # left out where both are alike
    if settings["image_config"]["model_type"] in SOURCES:
        image_trunk = new_classifier(settings["image_config"], form.size)
    else:
        image_trunk = _all_training(new_encoder(settings["image_config"]))
    form = form.at(image_size)
    image = _image_tower(image_trunk, image_head, form.size, settings["image_pooling"], set(), model)
    text_trunk = _all_training(new_encoder(settings["text_config"]))
    text = _text_tower(text_trunk, text_head, settings["text_pooling"], set(), model)
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
    flag = "--image-tower"
    if is_classifier(name):
        return _load_classifier(name, ModelFolder(flag, name, Path()), head, image_size, resize)
    model, half = find_half(flag, name)
    if not half and not is_open_clip(model.path) and is_timm(model.path):
        return _load_classifier(f"timm:local-dir:{model.path}", model, head, image_size, resize)
    with reading(flag, name):
        trunk, missing, projection = load_image_encoder(model, half)
        form = _encoder_form(model, trunk.config, resize).at(image_size)
        if projection is not None:
            head = head.of(projection, name)
        tower = _image_tower(trunk, head, form.size, None, missing, model)
    if projection is not None:
        tower.head = projection
    return tower, form, _encoder_settings(trunk.config), head


def _load_classifier(
    value: str, model: ModelFolder, head: Head, image_size: int | None, resize: ResizeFlag
) -> tuple[ImageTower, ImageForm, dict, Head]:
    with reading(model.flag, model.name):
        trunk, form, settings = load_classifier(value, image_size, resize)
        return _image_tower(trunk, head, form.size, "ready", set(), model), form, settings, head


def _load_text_tower(name: str, head: Head) -> tuple[TextTower, Head]:
    model, half = find_half("--text-tower", name)
    with reading(model.flag, name):
        trunk, missing, projection = load_text_encoder(model, half)
        if projection is not None:
            head = head.of(projection, name)
        tower = _text_tower(trunk, head, text_pooling(model, trunk.config), missing, model)
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
    model: ModelFolder,
) -> ImageTower:
    trunk.eval()  # one image is no batch to take statistics of
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    interpolate, patch_size = needs_interpolation(trunk, size), patch_size_of(trunk)
    own = getattr(getattr(trunk, "config", None), "image_size", "its own size")

    def refused(fault: Exception) -> InputError:
        return InputError(f"--image-size {size}: {model.name} does not take it ({fault}); use {own}")

    with raised_as(refused, RuntimeError, ValueError, AssertionError):
        pooling = pooling or image_pooling(trunk, noise, interpolate)
        tower = ImageTower(trunk, nn.Identity(), pooling, interpolate, patch_size)
        pooled, again = tower.pooled(noise), tower.pooled(noise.expand(2, -1, -1, -1))
    check_repeatable(pooled, again, model)
    check_and_settle(trunk, pooled, missing, model)
    return ImageTower(trunk, head.build(pooled.shape[1]), pooling, interpolate, patch_size)


@torch.enable_grad()
def _text_tower(
    trunk: PreTrainedModel, head: Head, pooling: Pooling, missing: set[str], model: ModelFolder
) -> TextTower:
    trunk.eval()
    masked = not trunk.config.model_type.startswith("siglip")
    tokens = torch.arange(4)[None]
    tower = TextTower(trunk, nn.Identity(), pooling, masked)
    pooled, again = (tower.pooled(each, torch.ones_like(each)) for each in (tokens, tokens.expand(2, -1)))
    check_repeatable(pooled, again, model)
    check_and_settle(trunk, pooled, missing, model)
    return TextTower(trunk, head.build(pooled.shape[1]), pooling, masked)


def _encoder_form(model: ModelFolder, config: PretrainedConfig, resize: ResizeFlag) -> ImageForm:
    """The form that the folder's files ask for, or the usual one of encoders of the kind."""
    if is_open_clip(model.path):
        return ImageForm.of(read_settings(model)["image_form"])
    return read_image_form(model.path, _default_form(config), f"{model.flag} {model.name}", resize)


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
