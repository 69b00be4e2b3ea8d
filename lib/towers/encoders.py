"""Encoders of transformers for composed pairs: loading, inputs and pooling."""

import inspect
import json
from typing import Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from lib.towers.dual import DUAL_MODELS, TEXT_POOLINGS, check_complete, load_dual_model, load_model
from lib.towers.model_files import NO_CODE, ModelFolder, find_model, is_open_clip
from lib.towers.processing import read_settings
from lib.towers.tower import Pooling, patch_size_of

# The kinds of pooling in older and newer files of sentence-transformers.
_SENTENCE_POOLINGS: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
# Halves of dual encoders that AutoModel does not know.
HALF_MODELS = {
    "altclip_text_model": transformers.AltCLIPTextModel,
    "altclip_vision_model": transformers.AltCLIPVisionModel,
    "chinese_clip_text_model": transformers.ChineseCLIPTextModel,
    "siglip_text_model": transformers.SiglipTextModel,
    "siglip2_text_model": transformers.Siglip2TextModel,
}
# Where a dual encoder keeps each half, and the projection after it.
_HALVES = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}


class Encoder(NamedTuple):
    """A pretrained encoder of transformers.

    missing: names of weights that the files lack.
    projection: the trained head of a half of a dual encoder, requested as `NAME#image` or `NAME#text`: CLIP's
        projection; an identity for SigLIP, whose halves return embeddings. None: it needs a fresh head.
    """

    trunk: PreTrainedModel
    missing: set[str]
    projection: nn.Module | None


def split_half(name: str) -> tuple[str, str | None]:
    """`NAME#text` -> NAME, "text"; a name without `#image` or `#text` comes back with None."""
    folder_or_id, _, half = name.rpartition("#")
    return (folder_or_id, half) if half in ("image", "text") and folder_or_id else (name, None)


def find_half(flag: str, name: str) -> tuple[ModelFolder, str | None]:
    """The folder of an encoder or dual encoder, under its whole name, and the half that the name requests."""
    folder_or_id, half = split_half(name)
    return find_model(flag, folder_or_id)._replace(name=name), half


def load_encoder(model: ModelFolder, asked: str | None, side: Literal["image", "text"]) -> Encoder:
    """The image or text encoder in the folder, or that half of its dual encoder; asked: as `split_half` returns it."""
    if asked not in (None, side):
        raise model.fault(f"this is the {asked} half; write {split_half(model.name)[0]}#{side}")
    if is_open_clip(model.path):
        settings = read_settings(model)
    else:
        settings = {"model_type": AutoConfig.from_pretrained(model.path, **NO_CODE).model_type}
    model_type = settings["model_type"]
    if model_type in DUAL_MODELS:
        dual, missing, _ = load_dual_model(model, settings)
        half, projection = _HALVES[side]
        if asked:
            check_complete(missing & {f"{projection}.weight"}, model)
        own = {key.removeprefix(f"{half}.") for key in missing if key.startswith(f"{half}.")}
        return Encoder(getattr(dual, half), own, getattr(dual, projection, nn.Identity()) if asked else None)
    if asked:
        raise model.fault(f"a model of type {model_type!r} has no halves; leave out #{asked}")
    trunk, missing, _ = load_model(HALF_MODELS.get(model_type, AutoModel), model)
    if side == "image" and trunk.main_input_name != "pixel_values":
        raise model.fault(f"a model of type {model_type!r} does not read images")
    if side == "text" and (trunk.main_input_name != "input_ids" or trunk.config.is_encoder_decoder):
        raise model.fault(f"a model of type {model_type!r} is not a text encoder without a decoder")
    return Encoder(trunk, missing, None)


def new_encoder(settings: dict) -> PreTrainedModel:
    """An encoder with random weights from the settings in its config.json; all of it trains, fixed embeddings too.

    So does an encoder that transformers loads: a resumed run trains the same weights as before.
    """
    config = AutoConfig.for_model(**settings)
    if config.model_type == "chinese_clip_text_model":  # within its model it has no pooler
        encoder = transformers.ChineseCLIPTextModel(config, add_pooling_layer=False)
    elif config.model_type in HALF_MODELS:
        encoder = HALF_MODELS[config.model_type](config)
    else:
        encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return encoder.requires_grad_(True)


def needs_interpolation(trunk: nn.Module, image_size: int) -> bool:
    """The encoder's position embeddings are for images of another side, and can be interpolated."""
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
    """The pooling in a sentence-transformers folder's settings, or a dual encoder's own; else the mean over tokens.

    Without training for sentences, the mean represents one better than [CLS] does (Reimers and Gurevych 2019,
    arXiv:1908.10084, table 1).
    """
    if config.model_type in TEXT_POOLINGS:
        return TEXT_POOLINGS[config.model_type]
    file = model.path / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    settings = json.loads(file.read_text())
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    asked = settings.get("pooling_mode") or "+".join(mode.removeprefix("pooling_mode_") for mode in modes)
    if asked not in _SENTENCE_POOLINGS:
        raise model.fault(f"it pools by {asked!r}; only the mean over tokens and [CLS] are known here")
    return _SENTENCE_POOLINGS[asked]
