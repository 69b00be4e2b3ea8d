"""How an encoder of transformers is fed, and what of its output counts as pooled."""

import inspect
import json
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AltCLIPTextModel,
    AltCLIPVisionModel,
    AutoConfig,
    AutoModel,
    ChineseCLIPTextModel,
    PretrainedConfig,
    PreTrainedModel,
    Siglip2TextModel,
    SiglipTextModel,
)

from lib.towers.model_files import NO_CODE, ModelFolder, find_model, is_open_clip
from lib.towers.processing import read_settings
from lib.towers.tower import Pooling
from lib.towers.weights import DUAL_MODELS, check_complete, load_dual_model, load_model

# The text halves of dual encoders.
TEXT_POOLINGS: dict[str, Pooling] = {
    "clip_text_model": "pooler",
    "altclip_text_model": "pooler",
    "chinese_clip_text_model": "cls",
    "siglip_text_model": "pooler",
    "siglip2_text_model": "pooler",
}
# What sentence-transformers calls the kinds of pooling, in its older and its newer files.
SENTENCE_POOLINGS: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}


def patch_size_of(trunk: nn.Module) -> int | None:
    """The side of the patches that an image encoder takes instead of images: SigLIP 2 of any resolution."""
    config = getattr(trunk, "config", None)
    return config.patch_size if config is not None and config.model_type == "siglip2_vision_model" else None


def needs_interpolation(trunk: nn.Module, image_size: int) -> bool:
    """Whether the encoder's position embeddings are for images of another side and can be interpolated."""
    own = getattr(getattr(trunk, "config", None), "image_size", image_size)
    known = inspect.signature(trunk.forward).parameters
    return own not in (image_size, [image_size] * 2, (image_size,) * 2) and "interpolate_pos_encoding" in known


@torch.no_grad()
def image_pooling(trunk: PreTrainedModel, pixel_values: Tensor, interpolate: bool) -> Pooling:
    """The encoder's own pooling; but a pooler with a dense layer belongs to a pre-training task: then [CLS].

    Checkpoints of classifiers come without such a pooler. A map that nothing pools is averaged.
    """
    if patch_size_of(trunk):
        return "pooler"
    fitting = {"interpolate_pos_encoding": True} if interpolate else {}
    output = trunk(pixel_values=pixel_values, **fitting)
    pooler = getattr(trunk, "pooler", None)
    dense = pooler is not None and any(isinstance(module, nn.Linear) for module in pooler.modules())
    if getattr(output, "pooler_output", None) is not None and not dense:
        return "pooler"
    return "mean" if output.last_hidden_state.ndim == 4 else "cls"


def text_pooling(model: ModelFolder, config: PretrainedConfig) -> Pooling:
    """What a sentence-transformers folder asks for, or a dual encoder's own; else the mean over tokens.

    The mean, because without training for sentences it says more about one than [CLS] does (Reimers and
    Gurevych 2019, arXiv:1908.10084, table 1).
    """
    if config.model_type in TEXT_POOLINGS:
        return TEXT_POOLINGS[config.model_type]
    file = model.path / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    settings = json.loads(file.read_text())
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    asked = settings.get("pooling_mode") or "+".join(mode.removeprefix("pooling_mode_") for mode in modes)
    if asked not in SENTENCE_POOLINGS:
        raise model.fault(f"it pools by {asked!r}; only the mean over tokens and [CLS] are known here")
    return SENTENCE_POOLINGS[asked]


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


class Encoder(NamedTuple):
    """A pretrained encoder of transformers.

    missing: names of weights that the files lack.
    projection: the head that belongs to it, if the half of a dual encoder was asked for as `NAME#image` or
        `NAME#text`: CLIP's projection, nothing for SigLIP, whose halves give embeddings. None: it wants a fresh one.
    """

    trunk: PreTrainedModel
    missing: set[str]
    projection: nn.Module | None


def split_half(name: str) -> tuple[str, str | None]:
    """`NAME#text` -> NAME, "text"; a name without `#image` or `#text` comes back with None."""
    folder_or_id, _, half = name.rpartition("#")
    return (folder_or_id, half) if half in ("image", "text") and folder_or_id else (name, None)


def find_half(flag: str, name: str, *, weights: bool = True) -> tuple[ModelFolder, str | None]:
    """The folder of an encoder or dual encoder, under its whole name, and which half of it the name asks for."""
    folder_or_id, half = split_half(name)
    return find_model(flag, folder_or_id, weights=weights)._replace(name=name), half


def load_image_encoder(model: ModelFolder, half: str | None) -> Encoder:
    """The image encoder in the folder, or the image half of its dual encoder; half: as `split_half` gives it."""
    encoder = _load_half(model, half, "image")
    if encoder.trunk.main_input_name != "pixel_values":
        raise model.fault(f"a model of type {encoder.trunk.config.model_type!r} does not read images")
    return encoder


def load_text_encoder(model: ModelFolder, half: str | None) -> Encoder:
    """The text encoder in the folder, or the text half of its dual encoder; half: as `split_half` gives it."""
    encoder = _load_half(model, half, "text")
    config = encoder.trunk.config
    if encoder.trunk.main_input_name != "input_ids" or config.is_encoder_decoder:
        raise model.fault(f"a model of type {config.model_type!r} is not a text encoder without a decoder")
    return encoder


def new_encoder(settings: dict) -> PreTrainedModel:
    """An encoder with drawn weights from the settings in its config.json."""
    config = AutoConfig.for_model(**settings)
    if config.model_type == "chinese_clip_text_model":  # within its model it has no pooler
        return ChineseCLIPTextModel(config, add_pooling_layer=False)
    if config.model_type in HALF_MODELS:
        return HALF_MODELS[config.model_type](config)
    return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _load_half(model: ModelFolder, asked: str | None, side: Literal["image", "text"]) -> Encoder:
    if asked not in (None, side):
        raise model.fault(f"this is the {asked} half; write {split_half(model.name)[0]}#{side}")
    if is_open_clip(model.path):
        settings = read_settings(model)
    else:
        settings = {"model_type": AutoConfig.from_pretrained(model.path, **NO_CODE).model_type}
    model_type = settings["model_type"]
    if model_type not in DUAL_MODELS:
        if asked:
            raise model.fault(f"a model of type {model_type!r} has no halves; leave out #{asked}")
        loaded = load_model(HALF_MODELS.get(model_type, AutoModel), model)
        return Encoder(loaded.model, loaded.missing, None)
    dual, missing, _ = load_dual_model(model, settings)
    half, projection = HALVES[side]
    if asked:
        check_complete(missing & {f"{projection}.weight"}, model)
    own = {key.removeprefix(f"{half}.") for key in missing if key.startswith(f"{half}.")}
    return Encoder(getattr(dual, half), own, getattr(dual, projection, nn.Identity()) if asked else None)


def check_and_settle(trunk: nn.Module, pooled: Tensor, missing: set[str], model: ModelFolder) -> None:
    """Stop training what the pooled output does not depend on; what it depends on must not be missing.

    pooled: (1, H), with its graph. Unused parts are poolers and mask tokens; DistributedDataParallel would
    wait for their gradients.
    """
    reached = _reached(pooled)
    trained = {key: each for key, each in trunk.named_parameters() if each.requires_grad}  # not a fixed embedding
    used = {key for key, parameter in trained.items() if parameter in reached}
    for key, parameter in trained.items():
        parameter.requires_grad_(key in used)
    check_complete(missing & used, model)


def _reached(output: Tensor) -> set[Tensor]:
    """The parameters that gradients of the output reach; nothing is computed for them."""
    found: set[Tensor] = set()
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


def check_repeatable(pooled: Tensor, again: Tensor, model: ModelFolder) -> None:
    """Refuse an encoder in eval mode whose output for the same input changes: it can be neither cached nor evaluated.

    pooled: (1, H); again: (2, H), of a batch of the same input twice. Sums in another order change a part of 1e-6.
    """
    apart = ((again - pooled).norm(dim=1) / pooled.norm()).max().item()
    if apart > 1e-3:
        raise model.fault(
            f"it gives another output for the same input each time (they differ by {apart:.0%} of their norm), as "
            "encoders that mask at random do; use another encoder, or set what masks to 0 in its config.json, such as "
            "mask_ratio"
        )
