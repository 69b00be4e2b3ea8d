"""Pairs composed of an image encoder and a text encoder, each with a projection head."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lib.data.pipeline import ResizeFlag
from lib.errors import InputError, raised_as
from lib.towers.dual import plain_settings, stop_unused
from lib.towers.encoders import (
    find_half,
    image_pooling,
    load_encoder,
    needs_interpolation,
    new_encoder,
    text_pooling,
)
from lib.towers.image_classifiers import SOURCES, is_classifier, is_timm, load_classifier, new_classifier
from lib.towers.image_form import DEFAULT_FORMS, ImageForm, read_image_form
from lib.towers.model_files import ModelFolder, is_open_clip, reading
from lib.towers.processing import Processing, make_processing, read_settings
from lib.towers.text_form import load_tokenizer
from lib.towers.tower import Head, ImageTower, Parts, Pooling, TextTower

AnyTower = TypeVar("AnyTower", ImageTower, TextTower)


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
) -> tuple[Parts, Processing]:
    """Put fresh heads on two pretrained encoders; returns them with the processing of their inputs.

    image_name: a folder or hub id, also of timm's, the image half of a dual encoder as `NAME#image` with its own
        projection, or a model of `lib.towers.image_classifiers`.
    text_name: a folder or hub id, or `NAME#text`.
    image_size: another side than the encoder's own files name. resize: as in `lib.towers.image_form.measured_form`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image, form, image_settings, image_head = _load_image_tower(image_name, image_head, image_size, resize)
        model, half = find_half("--text-tower", text_name)
        with reading(model.flag, text_name):
            encoder = load_encoder(model, half, "text")
            text_config = encoder.trunk.config
            text_head = text_head.of(encoder.projection, text_name)
            text = _text_tower(encoder.trunk, text_head, text_pooling(model, text_config), encoder.missing, model)
            tokenizer = load_tokenizer(model, text_config)
        text.head = text.head if encoder.projection is None else encoder.projection
    description = {
        "architectures": ["TwoTowers"],
        "model_type": "two_towers",
        "image_config": image_settings,
        "image_pooling": image.pooling,
        "image_form": asdict(form),
        "text_config": _encoder_settings(text_config),
        "text_pooling": text.pooling,
        "projection": asdict(image_head),
        "text_projection": asdict(text_head),
    }
    log_scale = torch.tensor(scale).log().item()
    parts = Parts(image, text, description, image_head.dim, form, log_scale, bias)
    return parts, make_processing(tokenizer, text_config, form, "two_towers")


def saved_pair(settings: dict, weights: dict[str, Tensor], model: ModelFolder, image_size: int | None) -> Parts:
    """Build the pair that config.json describes and fill in its weights."""
    form = ImageForm.of(settings["image_form"])
    image_head = Head(**settings["projection"])
    text_head = Head(**settings.get("text_projection", settings["projection"]))  # left out where both are alike
    if settings["image_config"]["model_type"] in SOURCES:
        image_trunk = new_classifier(settings["image_config"], form.size)
    else:
        image_trunk = new_encoder(settings["image_config"])
    form = form.at(image_size)
    image = _image_tower(image_trunk, image_head, form.size, settings["image_pooling"], set(), model)
    text = _text_tower(new_encoder(settings["text_config"]), text_head, settings["text_pooling"], set(), model)
    for part, tower in (("image.", image), ("text.", text)):
        tower.load_state_dict({key.removeprefix(part): each for key, each in weights.items() if key.startswith(part)})
    bias = weights["logit_bias"].item() if "logit_bias" in weights else None
    description = {key: value for key, value in settings.items() if not key.startswith("_")}
    description |= {"image_form": asdict(form)}
    log_scale = weights["logit_scale"].item()
    return Parts(image, text, description, image_head.dim, form, log_scale, bias, pretrained_bias=bool(bias))


def _load_image_tower(
    name: str, head: Head, image_size: int | None, resize: ResizeFlag
) -> tuple[ImageTower, ImageForm, dict, Head]:
    """The tower, the form of its images, its trunk's settings for config.json, and the form of its head."""
    flag = "--image-tower"
    if is_classifier(name):
        return _load_classifier(name, ModelFolder(flag, name, Path()), head, image_size, resize)
    model, half = find_half(flag, name)
    if not half and not is_open_clip(model.path) and is_timm(model.path):
        return _load_classifier(f"timm:local-dir:{model.path}", model, head, image_size, resize)
    with reading(flag, name):
        trunk, missing, projection = load_encoder(model, half, "image")
        form = _encoder_form(model, trunk.config, resize).at(image_size)
        head = head.of(projection, name)
        tower = _image_tower(trunk, head, form.size, None, missing, model)
    tower.head = tower.head if projection is None else projection
    return tower, form, _encoder_settings(trunk.config), head


def _load_classifier(
    value: str, model: ModelFolder, head: Head, image_size: int | None, resize: ResizeFlag
) -> tuple[ImageTower, ImageForm, dict, Head]:
    with reading(model.flag, model.name):
        trunk, form, settings = load_classifier(value, image_size, resize)
        return _image_tower(trunk, head, form.size, "ready", set(), model), form, settings, head


@torch.enable_grad()
def _image_tower(
    trunk: nn.Module,
    head: Head,
    size: int,
    pooling: Pooling | None,
    missing: set[str],
    model: ModelFolder,
) -> ImageTower:
    """Put a head on a trunk after a forward of one image, which shows the width of its output and faults."""
    trunk.eval()  # one image is no batch to take statistics of
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    interpolate = needs_interpolation(trunk, size)
    own = getattr(getattr(trunk, "config", None), "image_size", "its own size")

    def refused(fault: Exception) -> InputError:
        return InputError(f"--image-size {size}: {model.name} does not take it ({fault}); use {own}")

    with raised_as(refused, RuntimeError, ValueError, AssertionError):
        tower = ImageTower(trunk, nn.Identity(), pooling or image_pooling(trunk, noise, interpolate), interpolate)
        pooled, again = tower.pooled(noise), tower.pooled(noise.expand(2, -1, -1, -1))
    return _finished(tower, head, pooled, again, missing, model)


@torch.enable_grad()
def _text_tower(
    trunk: PreTrainedModel,
    head: Head,
    pooling: Pooling,
    missing: set[str],
    model: ModelFolder,
) -> TextTower:
    trunk.eval()
    tokens = torch.arange(4)[None]
    tower = TextTower(trunk, nn.Identity(), pooling)
    pooled, again = (tower.pooled(each, torch.ones_like(each)) for each in (tokens, tokens.expand(2, -1)))
    return _finished(tower, head, pooled, again, missing, model)


def _finished(
    tower: AnyTower, head: Head, pooled: Tensor, again: Tensor, missing: set[str], model: ModelFolder
) -> AnyTower:
    """Put the head on; refuse a trunk in eval mode whose output for the same input changes.

    Such outputs could be neither stored nor evaluated. pooled: (1, H); again: (2, H), of a batch of the same input
    twice. Sums in another order change 1e-6 of an output.
    """
    apart = ((again - pooled).norm(dim=1) / pooled.norm()).max().item()
    if apart > 1e-3:
        raise model.fault(
            f"it gives another output for the same input each time (they differ by {apart:.0%} of their norm), as do "
            "encoders that mask at random; use another encoder, or turn masking off in its config.json (mask_ratio 0)"
        )
    stop_unused(tower.trunk, pooled, missing, model)
    tower.head = head.build(pooled.shape[1])
    return tower


def _encoder_form(model: ModelFolder, config: PretrainedConfig, resize: ResizeFlag) -> ImageForm:
    """The form that the folder's files ask for, or the usual one of encoders of the kind."""
    if is_open_clip(model.path):
        return ImageForm.of(read_settings(model)["image_form"])
    family = config.model_type.removesuffix("_vision_model")
    usual = DEFAULT_FORMS.get(family, DEFAULT_FORMS["two_towers"])
    size = getattr(config, "image_size", usual.size)
    if family == "siglip2":
        size = math.isqrt(config.num_patches) * config.patch_size
    usual = replace(usual, size=size if isinstance(size, int) else size[0])
    return read_image_form(model.path, usual, f"{model.flag} {model.name}", resize)


def _encoder_settings(config: PretrainedConfig) -> dict:
    """The settings that build the encoder again, without those of a classifier."""
    left_out = ("architectures", "id2label", "label2id", "problem_type")
    return {key: value for key, value in plain_settings(config).items() if key not in left_out}
