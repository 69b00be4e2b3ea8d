"""Encoders of transformers by folder or hub id, or halves of its dual encoders, with clear errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AltCLIPModel,
    AltCLIPTextModel,
    AltCLIPVisionModel,
    AutoConfig,
    AutoModel,
    ChineseCLIPModel,
    ChineseCLIPTextModel,
    CLIPModel,
    PreTrainedModel,
    Siglip2Model,
    Siglip2TextModel,
    SiglipModel,
    SiglipTextModel,
)
from transformers.utils import logging

from lib.errors import InputError

DUAL_MODELS = {
    "clip": CLIPModel,
    "chinese_clip": ChineseCLIPModel,
    "altclip": AltCLIPModel,
    "siglip": SiglipModel,
    "siglip2": Siglip2Model,
}
# Halves of those that AutoModel does not know.
HALF_MODELS = {
    "altclip_text_model": AltCLIPTextModel,
    "altclip_vision_model": AltCLIPVisionModel,
    "chinese_clip_text_model": ChineseCLIPTextModel,
    "siglip_text_model": SiglipTextModel,
    "siglip2_text_model": Siglip2TextModel,
}
# Where a dual encoder keeps each half, and the projection behind it.
HALVES = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notes back: they are about parts that we leave out on purpose."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def reading(flag: str, value: str | Path) -> Iterator[None]:
    """Load something of transformers quietly; what cannot be loaded raises InputError for the flag."""
    try:
        with quiet():
            yield
    except InputError:
        raise
    except ImportError as error:
        reason = str(error).strip().split(". ")[0]
        raise InputError(f"{flag} {value}: needs a package that is not installed ({reason})") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{flag} {value}: cannot be loaded ({reason}). Give a local folder with config.json and "
            "model.safetensors, or an id of the Hugging Face hub; without a network an id works if the model "
            "is in the cache already (HF_HOME says where that is)"
        ) from error


def load_model(
    model_class: type[PreTrainedModel] | type[AutoModel], name: str | Path
) -> tuple[PreTrainedModel, set[str]]:
    """Load weights in float32; returns the model and the names of weights that the files lack."""
    model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    return model, set(report["missing_keys"])


class Encoder(NamedTuple):
    """A pretrained encoder of transformers.

    missing: names of weights that the files lack.
    projection: the head that belongs to it, if the half of a dual encoder was asked for as `NAME#image` or
        `NAME#text`: CLIP's projection, nothing for SigLIP, whose halves give embeddings. None: it wants a fresh one.
    """

    trunk: PreTrainedModel
    missing: set[str]
    projection: nn.Module | None


def split_half(name: str | Path) -> tuple[str, str | None]:
    """`NAME#text` -> NAME, "text"; a name without `#image` or `#text` comes back with None."""
    folder_or_id, _, half = str(name).rpartition("#")
    return (folder_or_id, half) if half in ("image", "text") and folder_or_id else (str(name), None)


def load_image_encoder(name: str) -> Encoder:
    """The image encoder of that name, or the image half of a dual encoder."""
    encoder = _load_half(name, "image", "--image-tower")
    if encoder.trunk.main_input_name != "pixel_values":
        kind = encoder.trunk.config.model_type
        raise InputError(f"--image-tower {name}: a model of type {kind!r} does not read images")
    return encoder


def load_text_encoder(name: str) -> Encoder:
    """The text encoder of that name, or the text half of a dual encoder."""
    encoder = _load_half(name, "text", "--text-tower")
    config = encoder.trunk.config
    if encoder.trunk.main_input_name != "input_ids" or config.is_encoder_decoder:
        raise InputError(
            f"--text-tower {name}: a model of type {config.model_type!r} is not a text encoder without a decoder"
        )
    return encoder


def new_encoder(settings: dict) -> PreTrainedModel:
    """An encoder with drawn weights from the settings in its config.json."""
    config = AutoConfig.for_model(**settings)
    if config.model_type == "chinese_clip_text_model":  # within its model it has no pooler
        return ChineseCLIPTextModel(config, add_pooling_layer=False)
    if config.model_type in HALF_MODELS:
        return HALF_MODELS[config.model_type](config)
    return AutoModel.from_config(config, dtype=torch.float32)


def _load_half(name: str, side: Literal["image", "text"], flag: str) -> Encoder:
    folder_or_id, asked = split_half(name)
    if asked not in (None, side):
        raise InputError(f"{flag} {name}: this is the {asked} half; write {folder_or_id}#{side}")
    model_type = AutoConfig.from_pretrained(folder_or_id).model_type
    if model_type not in DUAL_MODELS:
        if asked:
            raise InputError(f"{flag} {name}: a model of type {model_type!r} has no halves; leave out #{asked}")
        return Encoder(*load_model(HALF_MODELS.get(model_type, AutoModel), folder_or_id), None)
    model, missing = load_model(DUAL_MODELS[model_type], folder_or_id)
    half, projection = HALVES[side]
    if asked:
        check_complete(missing & {f"{projection}.weight"}, flag, name)
    own = {key.removeprefix(f"{half}.") for key in missing if key.startswith(f"{half}.")}
    return Encoder(getattr(model, half), own, getattr(model, projection, nn.Identity()) if asked else None)


def check_and_settle(trunk: nn.Module, pooled: Tensor, missing: set[str], flag: str, name: str | Path) -> None:
    """Stop training what the pooled output does not depend on; what it depends on must not be missing.

    pooled: (1, H), with its graph. Unused parts are poolers and mask tokens; DistributedDataParallel would
    wait for their gradients.
    """
    parameters = {key: each for key, each in trunk.named_parameters() if each.requires_grad}  # not a fixed embedding
    gradients = torch.autograd.grad(pooled.sum(), list(parameters.values()), allow_unused=True)
    used = {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in used)
    check_complete(missing & used, flag, name)


def check_repeatable(pooled: Tensor, again: Tensor, flag: str, name: str | Path) -> None:
    """Refuse an encoder in eval mode whose output for the same input changes: it can be neither cached nor evaluated.

    pooled: (1, H); again: (2, H), of a batch of the same input twice. Sums in another order change a part of 1e-6.
    """
    apart = ((again - pooled).norm(dim=1) / pooled.norm()).max().item()
    if apart > 1e-3:
        raise InputError(
            f"{flag} {name}: it gives another output for the same input each time (they differ by {apart:.0%} of "
            "their norm), as encoders that mask at random do; use another encoder, or set what masks to 0 in its "
            "config.json, such as mask_ratio"
        )


def check_complete(missing: set[str], flag: str, name: str | Path) -> None:
    """Refuse a model whose files lack weights: they would be random numbers."""
    if missing:
        raise InputError(
            f"{flag} {name}: the files lack {len(missing)} of the model's weights, {min(missing)} among "
            "them; is it the right folder, and whole?"
        )
