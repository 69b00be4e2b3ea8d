"""Dual encoders of transformers (CLIP, SigLIP and their kin), taken apart into two towers and named again for files."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.data.resize import ResizeFlag
from lib.errors import InputError
from lib.image_form import ImageForm, model_image_form, read_image_form
from lib.towers.encoders import DUAL_MODELS, check_complete, load_model
from lib.towers.pooling import TEXT_POOLINGS, patch_size_of
from lib.towers.tower import ImageTower, Parts, TextTower

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


def dual_parts(
    model: PreTrainedModel, image_form: ImageForm, bias: float | None, pretrained_bias: bool = False
) -> Parts:
    """Take a model apart; it is not to be used as a whole afterwards. The scale is the model's own."""
    model.config.architectures = [type(model).__name__]
    description = json.loads(model.config.to_json_string(use_diff=False)) | {"image_form": asdict(image_form)}
    description = {key: value for key, value in description.items() if not key.startswith("_")}
    log_scale = model.logit_scale.item()
    text_pooling = TEXT_POOLINGS[model.config.text_config.model_type]
    if model.config.model_type.startswith("siglip"):
        head = model.text_model.head
        model.text_model.head = nn.Identity()
        image = ImageTower(model.vision_model, nn.Identity(), "pooler", patch_size=patch_size_of(model.vision_model))
        text = TextTower(model.text_model, head, text_pooling, masked=False)
        embed_dim = head.out_features
    else:
        image = ImageTower(model.vision_model, model.visual_projection, "pooler")
        text = TextTower(model.text_model, model.text_projection, text_pooling, masked=True)
        embed_dim = model.config.projection_dim
    return Parts(image, text, description, embed_dim, image_form, log_scale, bias, pretrained_bias)


def load_dual(folder_or_id: str | Path, settings: dict, image_size: int | None, resize: ResizeFlag = "auto") -> Parts:
    """Load a dual encoder; for another image size its position embeddings are resized."""
    model_type = settings["model_type"]
    model, missing = load_model(DUAL_MODELS[model_type], folder_or_id)
    check_complete(missing, "--model", folder_or_id)
    own = model_image_form(settings)
    form = own if "image_form" in settings else read_image_form(folder_or_id, own, resize=resize)
    vision = model.config.vision_config
    if model_type == "siglip2":  # it fits its position embeddings to every image
        size = image_size or form.size
        check_image_size(size, vision.patch_size)
    else:
        size = image_size or vision.image_size
        model = model if size == vision.image_size else _resized(model, size)
    form = form.at(size)
    if model_type.startswith("siglip"):
        bias = model.logit_bias.item() if settings.get("use_bias", True) else None
    else:
        bias = _bias_of_clip(Path(folder_or_id))
    # A bias of exactly 0 is where transformers starts one: it was never trained.
    return dual_parts(model, form, bias, pretrained_bias=bool(bias))


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


def _bias_of_clip(folder: Path) -> float | None:
    """The bias that a CLIP-like model was trained with here; transformers itself knows none."""
    file = folder / "model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as weights:
        return weights.get_tensor("logit_bias").item() if "logit_bias" in set(weights.keys()) else None


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
