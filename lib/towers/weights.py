"""Weights in files of transformers and open_clip: their names, loading in float32, and what they must not lack."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AltCLIPModel,
    AutoConfig,
    AutoModel,
    ChineseCLIPModel,
    CLIPModel,
    PreTrainedModel,
    Siglip2Model,
    SiglipModel,
)

from lib.towers.model_files import NO_CODE, ModelFolder, is_open_clip, weights_file
from lib.towers.open_clip_names import from_open_clip

DUAL_MODELS = {
    "clip": CLIPModel,
    "chinese_clip": ChineseCLIPModel,
    "altclip": AltCLIPModel,
    "siglip": SiglipModel,
    "siglip2": Siglip2Model,
}
# Our names of the parts and those in the files of transformers. SigLIP projects texts by a layer inside its
# text model, which is our head; its images leave the attention pooling ready: the image tower has no head.
CLIP_NAMES = {
    "image.trunk.": "vision_model.",
    "image.head.": "visual_projection.",
    "text.trunk.": "text_model.",
    "text.head.": "text_projection.",
}
SIGLIP_NAMES = {
    "image.trunk.": "vision_model.",
    "text.trunk.": "text_model.",
    "text.head.": "text_model.head.",
}


class Loaded(NamedTuple):
    """A pretrained model in float32, with the names of the weights that its files lack, and its trained bias."""

    model: PreTrainedModel
    missing: set[str]
    bias: float | None
    """logit_bias of a dual encoder; None where the files have none."""


def load_model(model_class: type[PreTrainedModel] | type[AutoModel], model: ModelFolder) -> Loaded:
    """Load weights in float32; InputError where their shapes are not those of config.json."""
    loaded, report = model_class.from_pretrained(
        model.path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **NO_CODE
    )
    _check_shapes(report["mismatched_keys"], model)
    own = getattr(loaded, "logit_bias", None)
    bias = _extra_bias(model.path) if "logit_bias" in report["unexpected_keys"] else None
    return Loaded(loaded, set(report["missing_keys"]), bias if own is None else own.item())


def load_dual_model(model: ModelFolder, settings: dict) -> Loaded:
    """Load a dual encoder, from files of transformers or of open_clip; settings: as `read_settings` gives them."""
    model_class = DUAL_MODELS[settings["model_type"]]
    if not is_open_clip(model.path):
        return load_model(model_class, model)
    weights = _open_clip_weights(model, settings["model_type"])
    bias = weights["logit_bias"].item() if "logit_bias" in weights else None
    if settings["model_type"] == "clip":  # transformers' CLIP knows no bias
        weights.pop("logit_bias", None)
        weights["logit_scale"] = weights["logit_scale"].reshape(())
    loaded, report = model_class.from_pretrained(
        None,
        config=AutoConfig.for_model(**settings),
        state_dict=weights,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **NO_CODE,
    )
    _check_shapes(report["mismatched_keys"], model)
    if report["unexpected_keys"]:
        raise model.fault(
            f"its file of weights has {min(report['unexpected_keys'])}, which open_clip_config.json tells nothing of; "
            "is it the right file?"
        )
    return Loaded(loaded, set(report["missing_keys"]), bias)


def file_weights(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Rename a state dict of TwoTowers to what transformers expects in model.safetensors."""
    names = SIGLIP_NAMES if model_type.startswith("siglip") else CLIP_NAMES
    renamed = {}
    for name, value in weights.items():
        part = next((part for part in names if name.startswith(part)), "")
        renamed[names.get(part, "") + name.removeprefix(part)] = value
    if model_type.startswith("siglip"):  # it always has a bias, and keeps both numbers as vectors of length one
        bias = renamed.get("logit_bias", torch.zeros_like(renamed["logit_scale"]))
        renamed |= {"logit_scale": renamed["logit_scale"].reshape(1), "logit_bias": bias.reshape(1)}
    return renamed


def _open_clip_weights(model: ModelFolder, model_type: str) -> dict[str, Tensor]:
    """Weights under the names of transformers."""
    file = weights_file(model)
    pickled = file.suffix != ".safetensors"
    weights = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
    return file_weights(from_open_clip(weights, model_type), model_type)


def _extra_bias(folder: Path) -> float:
    """The bias that a CLIP-like model was trained with here; transformers itself knows none."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if "logit_bias" in set(weights.keys()):
                return weights.get_tensor("logit_bias").item()
    pickled = (torch.load(file, map_location="cpu", weights_only=True) for file in folder.glob("pytorch_model*.bin"))
    return next(weights["logit_bias"].item() for weights in pickled if "logit_bias" in weights)


def check_complete(missing: set[str], model: ModelFolder) -> None:
    """Refuse a model whose files lack weights: they would be random numbers."""
    if missing:
        raise model.fault(
            f"the files lack {len(missing)} of the model's weights, {min(missing)} among them; is it the right folder, "
            "and whole?"
        )


def _check_shapes(mismatched: set[tuple[str, torch.Size, torch.Size]], model: ModelFolder) -> None:
    if mismatched:
        name, there, wanted = min(mismatched)
        raise model.fault(
            f"{name} is of shape {tuple(there)} in its files and of shape {tuple(wanted)} by its configuration, and "
            f"{len(mismatched) - 1} more do not fit; give the two files of one download (--image-size takes images of "
            "another size)"
        )
