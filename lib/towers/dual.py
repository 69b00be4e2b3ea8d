"""Dual encoders of transformers (CLIP, SigLIP and their kin), taken apart into two towers."""

import json
from dataclasses import asdict

import torch
from torch import nn
from transformers import PreTrainedModel

from lib.data.pipeline import ResizeFlag
from lib.errors import InputError
from lib.towers.encoders import TEXT_POOLINGS, check_and_settle, patch_size_of
from lib.towers.image_form import ImageForm, model_image_form, read_image_form
from lib.towers.model_files import ModelFolder
from lib.towers.tower import ImageTower, Parts, TextTower
from lib.towers.weights import check_complete, load_dual_model


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


def load_dual(model: ModelFolder, settings: dict, image_size: int | None, resize: ResizeFlag = "auto") -> Parts:
    """Load a dual encoder; for another image size its position embeddings are resized.

    settings: as `read_settings` gives them.
    """
    model_type = settings["model_type"]
    dual, missing, bias = load_dual_model(model, settings)
    check_complete(missing, model)
    own = model_image_form(settings)
    form = own if "image_form" in settings else read_image_form(model.path, own, f"{model.flag} {model.name}", resize)
    vision = dual.config.vision_config
    if not getattr(vision, "vision_use_head", True):
        raise model.fault("its image encoder has no pooling head (vision_use_head is false), so it gives no embeddings")
    if model_type == "siglip2":  # it fits its position embeddings to every image
        size = image_size or form.size
        check_image_size(size, vision.patch_size)
    else:
        size = image_size or vision.image_size
        dual = dual if size == vision.image_size else _resized(dual, size)
    form = form.at(size)
    if not settings.get("use_bias", True):
        bias = None
    # A bias of exactly 0 is where transformers starts one: it was never trained.
    parts = dual_parts(dual, form, bias, pretrained_bias=bool(bias))
    _settle(parts, model)
    return parts


@torch.enable_grad()
def _settle(parts: Parts, model: ModelFolder) -> None:
    """Stop training parameters that an embedding does not depend on."""
    pixels, tokens = torch.zeros(1, 3, parts.image_form.size, parts.image_form.size), torch.arange(4)[None]
    check_and_settle(parts.image.trunk, parts.image.pooled(pixels), set(), model)
    check_and_settle(parts.text.trunk, parts.text.pooled(tokens, torch.ones_like(tokens)), set(), model)


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
