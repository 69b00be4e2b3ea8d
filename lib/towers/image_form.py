"""Form of a model's images: size, normalization, and the way of resizing to a square.

It is measured, not read: hundreds of image processors have settings of their own, with defaults in their code. So the
model's own preparation is run on a probe image, and so is ours, until one of our forms gives the same pixels.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from lib.data.pipeline import MODES, Channels, ImagePipeline, Interpolation, Resize, ResizeFlag, Way
from lib.errors import InputError, raised_as
from lib.towers.model_files import NO_CODE

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

FILES = ("preprocessor_config.json", "processor_config.json")
UNREADABLE = (OSError, ValueError, ImportError)  # a damaged file, a type that transformers does not know, a package

TOLERANCE = 0.6
"""Largest mean difference of a probe image's pixels, in levels of 255 before normalization: 0.01 normalized units.

Rounding differs by 0.01 between Pillow and torch and by 0.3 in a processor that resizes floats. Lanczos in place of
bicubic interpolation differs by 0.9, bilinear by 2, a side that is one pixel longer by 5, another channel order by 30.
"""

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in [0, 1], one number a channel."""


@dataclass(frozen=True)
class ImageForm:
    """The size, normalization and way of resizing of an image encoder's inputs."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize

    @classmethod
    def of(cls, settings: dict) -> "ImageForm":
        """The form in a config.json; older ones have only a way of resizing."""
        resize = settings["resize"]
        square = Resize(**(resize if isinstance(resize, dict) else {"way": resize}))
        return cls(settings["size"], tuple(settings["mean"]), tuple(settings["std"]), square)

    def at(self, size: int | None) -> "ImageForm":
        """The form for images of another side, or None for this one; the same part of an image is cut off."""
        side = self.resize.side
        if size and side:
            side = round(side * size / self.size)
        return replace(self, size=size or self.size, resize=replace(self.resize, side=side))

    def normalized(self, image: Image.Image) -> Tensor:
        """An image as the pixels (3, size, size) that an encoder of this form takes."""
        pixels = ImagePipeline(self.size, self.resize)(image, 0) / 255
        return (pixels - _column(self.mean)) / _column(self.std)


@dataclass(frozen=True)
class Preparation:
    """A model's own preparation of images, with the values in its settings, which are tried first."""

    process: Callable[[Image.Image], Tensor]
    """From an image to normalized pixels (3, H, W)."""
    sides: tuple[int, ...]
    """To which it may resize."""
    interpolation: str | None = None
    normalization: Normalization | None = None
    """Mean and standard deviation, with more digits than measured ones have."""
    of_squares: bool = False
    """It keeps the proportions of other images; these are squashed here."""


DEFAULT_FORMS = {
    "clip": ImageForm(224, CLIP_MEAN, CLIP_STD, Resize("crop")),
    "chinese_clip": ImageForm(224, CLIP_MEAN, CLIP_STD, Resize("squash")),
    "altclip": ImageForm(224, CLIP_MEAN, CLIP_STD, Resize("crop")),
    "siglip": ImageForm(224, SIGLIP_MEAN, SIGLIP_STD, Resize("squash")),
    "siglip2": ImageForm(256, SIGLIP_MEAN, SIGLIP_STD, Resize("squash")),
    "two_towers": ImageForm(224, IMAGENET_MEAN, IMAGENET_STD, Resize("crop")),
}


def model_image_form(settings: dict) -> ImageForm:
    """The image form in a model's config.json; without one, the usual form of its type."""
    if "image_form" in settings:
        return ImageForm.of(settings["image_form"])
    form, vision = DEFAULT_FORMS[settings["model_type"]], settings.get("vision_config") or {}
    if settings["model_type"] == "siglip2":
        return replace(form, size=math.isqrt(vision.get("num_patches", 256)) * vision.get("patch_size", 16))
    return replace(form, size=vision.get("image_size", form.size))


def read_image_form(
    folder: Path, default: ImageForm, name: str | None = None, resize: ResizeFlag = "auto"
) -> ImageForm:
    """The form that prepares images as the image-processor files of a folder do; the default without files.

    name: the flag and its value, for errors. resize: as in `measured_form`.
    Raises InputError for files that transformers cannot read, and for a processor that no form of ours equals.
    """
    name = name or f"--model {folder}"
    if not _has_processor(folder):
        return default
    refusal = raised_as(lambda fault: unlike(name, f"cannot be loaded ({fault})"), *UNREADABLE)
    processor = None
    with refusal if resize == "auto" else suppress(*UNREADABLE):
        processor = AutoImageProcessor.from_pretrained(folder, **NO_CODE)
    return default if processor is None else measured_form(preparation(processor), default, name, resize)


def _has_processor(folder: Path) -> bool:
    return any((folder / file).is_file() for file in FILES)


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
    if not _has_processor(folder):
        return None
    own = preparation(AutoImageProcessor.from_pretrained(folder, **NO_CODE))
    image = probe(own.of_squares)
    return difference(form, own.process(image).float(), image)


def measured_form(own: Preparation, default: ImageForm, name: str, resize: ResizeFlag = "auto") -> ImageForm:
    """The form that gives the pixels of a model's own preparation, found by running both on probe images.

    default: for what cannot be measured. name: the flag and its value, for errors. resize: ways other than auto
    keep only size, normalization and channels.
    Raises InputError for auto where no form comes closer than TOLERANCE.
    """
    image, plain = probe(own.of_squares), default
    with nullcontext() if resize == "auto" else suppress(InputError):
        theirs, solid = _run(own, image, name)
        mean, std, channels = _normalization(solid, own.normalization, name)
        square = theirs.shape[1] == theirs.shape[2]
        plain = ImageForm(theirs.shape[1] if square else default.size, mean, std, Resize(channels=channels))
    if resize != "auto":
        return replace(plain, resize=Resize(resize, channels=plain.resize.channels))
    return _nearest(own, plain, theirs, image, name)


def _run(own: Preparation, image: Image.Image, name: str) -> tuple[Tensor, list[Tensor]]:
    """The image prepared, and the middle pixels (3,) of prepared black, white and orange; bars may be around them."""
    with raised_as(lambda fault: unlike(name, f"cannot be run on an image ({fault})"), Exception):
        colors = ((0, 0, 0), (255, 255, 255), (255, 128, 0))
        theirs, *solid = (own.process(each) for each in (image, *(Image.new("RGB", (64, 64), each) for each in colors)))
    if theirs.ndim != 3 or len(theirs) != 3:
        raise unlike(name, f"makes {' x '.join(map(str, theirs.shape))} numbers of an image")
    return theirs.float(), [each[:, each.shape[1] // 2, each.shape[2] // 2].double() for each in solid]


def _nearest(own: Preparation, plain: ImageForm, theirs: Tensor, image: Image.Image, name: str) -> ImageForm:
    """The form of that size and normalization that gives their pixels of the image; InputError where none does."""
    if theirs.shape != (3, plain.size, plain.size):
        raise unlike(name, f"makes {theirs.shape[1]} x {theirs.shape[2]} pixels of an image, which is not square")

    def closest(resizes: list[Resize]) -> tuple[float, Resize]:
        """The first within TOLERANCE, else the one that differs least."""
        tried = []
        for resize in resizes:
            tried.append((difference(replace(plain, resize=resize), theirs, image), resize))
            if tried[-1][0] <= TOLERANCE:
                return tried[-1]
        return min(tried, key=lambda each: each[0])

    ways: tuple[Way, ...] = ("squash",) if own.of_squares else ("crop", "squash", "pad")
    sides = sorted({plain.size, *own.sides}, key=lambda side: abs(side - plain.size))
    first: Interpolation = own.interpolation if own.interpolation in MODES else "bicubic"
    apart, resize = closest(
        [
            replace(plain.resize, way=way, side=None if side == plain.size else side, interpolation=first)
            for side, way in product(sides, ways)
        ]
    )
    if not apart <= TOLERANCE:
        apart, resize = closest([replace(resize, interpolation=each) for each in MODES])
    if not apart <= TOLERANCE:
        raise unlike(
            name, f"gives pixels that differ by {apart:.1f} of 255 levels on average from our nearest ({resize})"
        )
    return replace(plain, resize=resize)


def difference(form: ImageForm, theirs: Tensor, image: Image.Image) -> float:
    """Mean difference from normalized pixels of the image, in levels of 255 before normalization.

    The place of a crop is rounded up by torchvision and down by transformers: of offsets of one pixel the best counts.
    """
    if theirs.shape != (3, form.size, form.size):
        return math.inf
    inner = form.size - 2
    every = 1 + inner // 128  # some rows are enough

    def middle(pixels: Tensor, down: int = 1, right: int = 1) -> Tensor:
        return pixels[:, down : down + inner : every, right : right + inner]

    ours, levels = form.normalized(image), 255 * _column(form.std).abs()
    offsets = product(range(3), repeat=2)
    return min(((middle(ours, *each) - middle(theirs)).abs() * levels).mean().item() for each in offsets)


@cache
def probe(square: bool = False) -> Image.Image:
    """An image with detail of every size, 1020 x 510: no interpolation or side gives the pixels of another.

    Twice as wide as high, so that all libraries round the longer side alike; its height is no usual size, so that it
    is never left as it is.
    """
    height, width = 510, 510 if square else 1020
    random = np.random.default_rng(0)
    layers = [random.uniform(-1, 1, (-(-height // size), -(-width // size), 3)) for size in (1, 2, 4, 8, 16, 32, 64)]
    enlarged = [layer.repeat(2**power, 0).repeat(2**power, 1)[:height, :width] for power, layer in enumerate(layers)]
    total = np.sum(enlarged, axis=0)
    return Image.fromarray(np.rint(127.5 + 127.5 * total / np.abs(total).max()).astype(np.uint8))


def _normalization(
    solid: list[Tensor], declared: Normalization | None, name: str
) -> tuple[tuple[float, ...], tuple[float, ...], Channels]:
    """Mean, standard deviation and order of the channels, from prepared black, white and orange.

    Offsets and a second normalization are in these numbers already.
    """
    black, white, orange = solid
    std = 1 / (white - black)
    mean = -black * std
    levels = orange * std + mean
    orders: dict[Channels, list[float]] = {"rgb": [1, 128 / 255, 0], "bgr": [0, 128 / 255, 1]}
    channels = next((order for order, each in orders.items() if np.allclose(levels, each, atol=1e-3)), None)
    if channels is None:
        raise unlike(name, "does more to colours than a mean and a standard deviation for each channel")
    identity = (0.0,) * 3, (1.0,) * 3
    if channels == "bgr" and not _are(identity, mean, std):
        # transformers' image processor for this order does not normalize: the form could not be saved
        raise unlike(name, "gives normalized channels in the order BGR")
    exact = next((each for each in (declared, identity) if each and _are(each, mean, std)), None)
    if exact is None:
        exact = tuple(round(value, 6) for value in mean.tolist()), tuple(round(value, 6) for value in std.tolist())
    return *exact, channels


def _are(exact: Normalization, mean: Tensor, std: Tensor) -> bool:
    return np.allclose([*exact[0], *exact[1]], [*mean, *std], atol=1e-5)


def unlike(name: str, reason: str) -> InputError:
    """The error, of one line, for an image processor that our pipeline cannot imitate."""
    reason = " ".join(reason.split())[:300]
    return InputError(
        f"{name}: its image processor {reason}; --resize crop, pad or squash trains it with images of our own form"
    )


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]
