"""The form of the images that a model was made for: size, normalization, and how they become square."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import AutoImageProcessor

from lib.model_files import NO_CODE

Resize = Literal["crop", "squash", "pad"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageForm:
    """The size, normalization and way of resizing that an image encoder was made for."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize


DEFAULT_FORMS = {
    "clip": ImageForm(224, CLIP_MEAN, CLIP_STD, "crop"),
    "chinese_clip": ImageForm(224, CLIP_MEAN, CLIP_STD, "squash"),
    "altclip": ImageForm(224, CLIP_MEAN, CLIP_STD, "crop"),
    "siglip": ImageForm(224, SIGLIP_MEAN, SIGLIP_STD, "squash"),
    "siglip2": ImageForm(256, SIGLIP_MEAN, SIGLIP_STD, "squash"),
    "two_towers": ImageForm(224, IMAGENET_MEAN, IMAGENET_STD, "crop"),
}


def model_image_form(settings: dict) -> ImageForm:
    """The image form that a model's config.json names; what its type usually has where it says nothing."""
    if "image_form" in settings:
        return ImageForm(**settings["image_form"])
    form, vision = DEFAULT_FORMS[settings["model_type"]], settings.get("vision_config") or {}
    if settings["model_type"] == "siglip2":
        return replace(form, size=math.isqrt(vision.get("num_patches", 256)) * vision.get("patch_size", 16))
    return replace(form, size=vision.get("image_size", form.size))


def read_image_form(folder: str | Path, default: ImageForm) -> ImageForm:
    """What the image-processor files of a folder ask for; the default without such files."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder, **NO_CODE)
    except (OSError, ValueError):  # no such file, or one that names no known processor
        return default
    if hasattr(processor, "max_num_patches"):  # SigLIP 2 of any resolution: the square that it has positions for
        side = math.isqrt(processor.max_num_patches) * processor.patch_size
        return ImageForm(side, tuple(processor.image_mean), tuple(processor.image_std), "squash")
    size, crop = processor.size, getattr(processor, "crop_size", None)
    if not getattr(processor, "do_center_crop", False):
        crop = None
    kept: Resize = "crop" if crop is not None or size.shortest_edge else "squash"
    resize: Resize = "pad" if size.max_height else kept
    side = (size.height or size.shortest_edge) if crop is None else crop.height
    if not processor.do_normalize:
        return ImageForm(side, (0.0,) * 3, (1.0,) * 3, resize)
    return ImageForm(side, tuple(processor.image_mean), tuple(processor.image_std), resize)
