"""The form of the images that a model was made for: size, normalization, and how they become square."""

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from lib.data.pipeline import Resize, ResizeFlag
from lib.errors import raised_as
from lib.towers.measured_form import ImageForm, Preparation, difference, measured_form, probe, unlike
from lib.towers.model_files import NO_CODE

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

FILES = ("preprocessor_config.json", "processor_config.json")
UNREADABLE = (OSError, ValueError, ImportError)  # a damaged file, a type that transformers does not know, a package


DEFAULT_FORMS = {
    "clip": ImageForm(224, CLIP_MEAN, CLIP_STD, Resize("crop")),
    "chinese_clip": ImageForm(224, CLIP_MEAN, CLIP_STD, Resize("squash")),
    "altclip": ImageForm(224, CLIP_MEAN, CLIP_STD, Resize("crop")),
    "siglip": ImageForm(224, SIGLIP_MEAN, SIGLIP_STD, Resize("squash")),
    "siglip2": ImageForm(256, SIGLIP_MEAN, SIGLIP_STD, Resize("squash")),
    "two_towers": ImageForm(224, IMAGENET_MEAN, IMAGENET_STD, Resize("crop")),
}


def model_image_form(settings: dict) -> ImageForm:
    """The image form that a model's config.json names; what its type usually has where it says nothing."""
    if "image_form" in settings:
        return ImageForm.of(settings["image_form"])
    form, vision = DEFAULT_FORMS[settings["model_type"]], settings.get("vision_config") or {}
    if settings["model_type"] == "siglip2":
        return replace(form, size=math.isqrt(vision.get("num_patches", 256)) * vision.get("patch_size", 16))
    return replace(form, size=vision.get("image_size", form.size))


def read_image_form(
    folder: Path,
    default: ImageForm,
    name: str | None = None,
    resize: ResizeFlag = "auto",
) -> ImageForm:
    """The form that prepares images as the image-processor files of a folder do; the default without files.

    name: the flag and its value, for errors. resize: as in `measured_form`.
    Raises InputError for files that transformers cannot read, and for a processor that no form of ours equals.
    """
    name = name or f"--model {folder}"
    if not any((folder / file).is_file() for file in FILES):
        return default
    refusal = raised_as(lambda fault: unlike(name, f"cannot be loaded ({fault})"), *UNREADABLE)
    processor = None
    with refusal if resize == "auto" else suppress(*UNREADABLE):
        processor = AutoImageProcessor.from_pretrained(folder, **NO_CODE)
    return default if processor is None else measured_form(preparation(processor), default, name, resize)


def preparation(processor: BaseImageProcessor) -> Preparation:
    """The preparation that an image processor of transformers does."""
    settings = processor.to_dict()
    sizes = [settings.get(name) for name in ("size", "crop_size")]
    sides = {side for size in sizes if isinstance(size, dict) for side in size.values() if isinstance(side, int)}
    # Some resize to more than they cut out by a share of their own, LeViT by the customary 224 of 256.
    sides |= {int(side / share) for side in sides for share in (settings.get("crop_pct") or 1, 224 / 256)}
    resample, mean, std = (settings.get(name) for name in ("resample", "image_mean", "image_std"))
    listed = isinstance(mean, list | tuple) and isinstance(std, list | tuple)
    return Preparation(
        process=lambda image: _pixels(processor(image, return_tensors="pt"), settings.get("patch_size")),
        sides=tuple(sorted(sides)),
        interpolation=Image.Resampling(resample).name.lower() if isinstance(resample, int) else None,
        normalization=(tuple(mean), tuple(std)) if listed else None,
        of_squares="max_num_patches" in settings,
    )


def _pixels(output: dict[str, Tensor], patch_size: int | None) -> Tensor:
    """The pixels of one image; SigLIP 2's processor for any resolution gives them patch by patch."""
    if "spatial_shapes" not in output:
        return output["pixel_values"][0]
    rows, columns = output["spatial_shapes"][0].tolist()
    patches = output["pixel_values"][0, : rows * columns]
    return rearrange(patches, "(h w) (p q c) -> c (h p) (w q)", h=rows, w=columns, p=patch_size, q=patch_size)


def difference_of_files(form: ImageForm, folder: Path) -> float | None:
    """Difference of a folder's image processor from the form, as `difference`; None where there is no such file."""
    if not any((folder / file).is_file() for file in FILES):
        return None
    own = preparation(AutoImageProcessor.from_pretrained(folder, **NO_CODE))
    image = probe(own.of_squares)
    return difference(form, own.process(image).float(), image)
