"""Dual encoders of transformers (CLIP, SigLIP and their kin): their weights in float32, and their two towers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from lib.data.pipeline import ResizeFlag
from lib.errors import InputError
from lib.towers.image_form import ImageForm, model_image_form, read_image_form
from lib.towers.model_files import NO_CODE, OPEN_CLIP_WEIGHTS, ModelFolder, is_open_clip
from lib.towers.open_clip_files import from_open_clip, renamed
from lib.towers.tower import ImageTower, Parts, Pooling, TextTower

DUAL_MODELS = {
    "clip": transformers.CLIPModel,
    "chinese_clip": transformers.ChineseCLIPModel,
    "altclip": transformers.AltCLIPModel,
    "siglip": transformers.SiglipModel,
    "siglip2": transformers.Siglip2Model,
}
TEXT_POOLINGS: dict[str, Pooling] = {
    "clip_text_model": "pooler",
    "altclip_text_model": "pooler",
    "chinese_clip_text_model": "cls",
    "siglip_text_model": "pooler",
    "siglip2_text_model": "pooler",
}
"""Pooling of the text halves."""
# Names of the parts here and in the files of transformers. SigLIP projects texts by a layer inside its text model, our
# head; its image encoder pools by attention and has no projection after that: its image tower has no head.
_CLIP_NAMES = {
    "image.trunk.": "vision_model.",
    "image.head.": "visual_projection.",
    "text.trunk.": "text_model.",
    "text.head.": "text_projection.",
}
_SIGLIP_NAMES = {"image.trunk.": "vision_model.", "text.trunk.": "text_model.", "text.head.": "text_model.head."}


class Loaded(NamedTuple):
    """A pretrained model in float32, with the names of the weights that its files lack, and its trained bias."""

    model: PreTrainedModel
    missing: set[str]
    bias: float | None
    """logit_bias of a dual encoder; None where the files have none."""


def dual_parts(
    model: PreTrainedModel, image_form: ImageForm, bias: float | None, pretrained_bias: bool = False
) -> Parts:
    """Take a model apart; it is not to be used as a whole afterwards. The scale is the model's own."""
    model.config.architectures = [type(model).__name__]
    description = plain_settings(model.config) | {"image_form": asdict(image_form)}
    if model.config.model_type.startswith("siglip"):
        image_head, text_head = nn.Identity(), model.text_model.head
        model.text_model.head = nn.Identity()
        embed_dim = text_head.out_features
    else:
        image_head, text_head = model.visual_projection, model.text_projection
        embed_dim = model.config.projection_dim
    image = ImageTower(model.vision_model, image_head, "pooler")
    text = TextTower(model.text_model, text_head, TEXT_POOLINGS[model.config.text_config.model_type])
    log_scale = model.logit_scale.item()
    return Parts(image, text, description, embed_dim, image_form, log_scale, bias, pretrained_bias)


def plain_settings(config: PretrainedConfig) -> dict:
    """The settings that build a model again, without those that say where it came from."""
    settings = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def load_dual(model: ModelFolder, settings: dict, image_size: int | None, resize: ResizeFlag) -> Parts:
    """Load a dual encoder; for another image size its position embeddings are resized.

    settings: as `read_settings` returns them.
    """
    dual, missing, bias = load_dual_model(model, settings)
    check_complete(missing, model)
    form = model_image_form(settings)
    if "image_form" not in settings:
        form = read_image_form(model.path, form, f"{model.flag} {model.name}", resize)
    vision = dual.config.vision_config
    if not getattr(vision, "vision_use_head", True):
        raise model.fault("its image encoder has no pooling head (vision_use_head is false), so it gives no embeddings")
    if settings["model_type"] == "siglip2":  # it fits its position embeddings to every image
        size = image_size or form.size
        check_image_size(size, vision.patch_size)
    else:
        size = image_size or vision.image_size
        dual = dual if size == vision.image_size else _resized(dual, size)
    if not settings.get("use_bias", True):
        bias = None
    # A bias of exactly 0 is where transformers starts one: it was never trained.
    parts = dual_parts(dual, form.at(size), bias, pretrained_bias=bool(bias))
    with torch.enable_grad():
        pixels, tokens = torch.zeros(1, 3, size, size), torch.arange(4)[None]
        stop_unused(parts.image.trunk, parts.image.pooled(pixels), set(), model)
        stop_unused(parts.text.trunk, parts.text.pooled(tokens, torch.ones_like(tokens)), set(), model)
    return parts


def check_image_size(image_size: int, patch_size: int) -> None:
    """Refuse an image side that does not divide into patches."""
    if image_size % patch_size:
        nearest = max(1, round(image_size / patch_size)) * patch_size
        raise InputError(
            f"--image-size {image_size} is not a multiple of the model's patch size {patch_size}; "
            f"the nearest that is: {nearest}"
        )


@torch.no_grad()
def _resized(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The same model for images of another side: position embeddings interpolated as transformers does it."""
    vision = model.config.vision_config
    check_image_size(image_size, vision.patch_size)
    embeddings, weights = model.vision_model.embeddings, model.state_dict()
    own_tokens = embeddings.position_embedding.num_embeddings - (vision.image_size // vision.patch_size) ** 2
    tokens = torch.empty(1, (image_size // vision.patch_size) ** 2 + own_tokens, vision.hidden_size)
    positions = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    weights["vision_model.embeddings.position_embedding.weight"] = positions[0]
    vision.image_size = image_size
    resized = type(model)(model.config)
    resized.load_state_dict(weights)
    return resized.eval()


def load_model(model_class: type[PreTrainedModel] | type[AutoModel], model: ModelFolder) -> Loaded:
    """Load weights in float32; InputError where their shapes are not those of config.json."""
    loaded, report = _with_report(model_class, model)
    own = getattr(loaded, "logit_bias", None)
    bias = _extra_bias(model.path) if "logit_bias" in report["unexpected_keys"] else None
    return Loaded(loaded, set(report["missing_keys"]), bias if own is None else own.item())


def load_dual_model(model: ModelFolder, settings: dict) -> Loaded:
    """Load a dual encoder, from files of transformers or of open_clip; settings: as `read_settings` returns them."""
    model_type = settings["model_type"]
    if not is_open_clip(model.path):
        return load_model(DUAL_MODELS[model_type], model)
    weights = _open_clip_weights(model, model_type)
    bias = weights["logit_bias"].item() if "logit_bias" in weights else None
    if model_type == "clip":  # transformers' CLIP knows no bias
        weights.pop("logit_bias", None)
        weights["logit_scale"] = weights["logit_scale"].reshape(())
    loaded, report = _with_report(DUAL_MODELS[model_type], model, AutoConfig.for_model(**settings), weights)
    if report["unexpected_keys"]:
        raise model.fault(
            f"its file of weights has {min(report['unexpected_keys'])}, which open_clip_config.json does not mention; "
            "is it the right file?"
        )
    return Loaded(loaded, set(report["missing_keys"]), bias)


def _with_report(
    model_class: type[PreTrainedModel] | type[AutoModel],
    model: ModelFolder,
    config: PretrainedConfig | None = None,
    weights: dict[str, Tensor] | None = None,
) -> tuple[PreTrainedModel, dict]:
    """The model, built of the folder's files or of these, and transformers' report on names of weights."""
    loaded, report = model_class.from_pretrained(
        model.path if weights is None else None,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, in one line
        **NO_CODE,
    )
    if report["mismatched_keys"]:
        name, there, wanted = min(report["mismatched_keys"])
        raise model.fault(
            f"{name} is of shape {tuple(there)} in its files and of shape {tuple(wanted)} by its configuration, and "
            f"{len(report['mismatched_keys']) - 1} more do not fit; give the two files of one download (--image-size "
            "takes images of another size)"
        )
    return loaded, report


def file_weights(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Rename a state dict of TwoTowers to what transformers expects in model.safetensors."""
    siglip = model_type.startswith("siglip")
    names = _SIGLIP_NAMES if siglip else _CLIP_NAMES
    found = {renamed(name, names): value for name, value in weights.items()}
    if siglip:  # it always has a bias, and keeps both numbers as vectors of length one
        bias = found.get("logit_bias", torch.zeros_like(found["logit_scale"]))
        found |= {"logit_scale": found["logit_scale"].reshape(1), "logit_bias": bias.reshape(1)}
    return found


def _open_clip_weights(model: ModelFolder, model_type: str) -> dict[str, Tensor]:
    """Weights under the names of transformers."""
    names = [name for names in OPEN_CLIP_WEIGHTS for name in names]
    file = next((model.path / name for name in names if (model.path / name).is_file()), None)
    if file is None:
        raise model.fault(f"there is no file named {' or '.join(names)}; is the download whole?")
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


def stop_unused(trunk: nn.Module, pooled: Tensor, missing: set[str], model: ModelFolder) -> None:
    """Stop training what the pooled output (1, H) does not depend on; what it depends on must not be missing.

    Unused are poolers and mask tokens: DistributedDataParallel would wait for their gradients in every step.
    """
    reached: set[Tensor] = set()  # by gradients of the output, which are not computed for this
    seen, waiting = set(), [pooled.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    trained = {key: each for key, each in trunk.named_parameters() if each.requires_grad}  # not a fixed embedding
    used = {key for key, parameter in trained.items() if parameter in reached}
    for key, parameter in trained.items():
        parameter.requires_grad_(key in used)
    check_complete(missing & used, model)
