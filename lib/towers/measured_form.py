"""The form of a model's images, measured: the model's own preparation is run on a few probe images, and so is ours."""

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib.data.pipeline import MODES, Channels, ImagePipeline, Interpolation, Resize, ResizeFlag, Way
from lib.errors import InputError, raised_as

TOLERANCE = 0.6
"""Largest mean difference of a probe image's pixels, in levels of 255 before normalization: 0.01 normalized units.

Rounding differs by 0.01 between Pillow and torch and by 0.3 in a processor that resizes floats. Lanczos in place of
bicubic interpolation differs by 0.9, bilinear by 2, a side that is one pixel longer by 5, another channel order by 30.
"""

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in [0, 1], one number a channel."""


@dataclass(frozen=True)
class ImageForm:
    """The size, normalization and way of resizing that an image encoder was made for."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize

    @classmethod
    def of(cls, settings: dict) -> "ImageForm":
        """The form that a config.json holds; older ones know a way of resizing only."""
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
        """What an encoder of this form gets of an image (3, size, size)."""
        pixels = ImagePipeline(self.size, self.resize)(image, 0) / 255
        return (pixels - _column(self.mean)) / _column(self.std)


@dataclass(frozen=True)
class Preparation:
    """A model's own preparation of images, and what its settings say of it: that is tried first."""

    process: Callable[[Image.Image], Tensor]
    """From an image to normalized pixels (3, H, W)."""
    sides: tuple[int, ...]
    """To which it may resize."""
    interpolation: str | None = None
    normalization: Normalization | None = None
    """Mean and standard deviation, with more digits than what is measured."""
    of_squares: bool = False
    """It keeps the proportions of other images; these are squashed here."""


def measured_form(own: Preparation, default: ImageForm, name: str, resize: ResizeFlag = "auto") -> ImageForm:
    """The form that gives the pixels of a model's own preparation, found by running both on probe images.

    default: for what cannot be measured. name: the flag and its value, for errors. resize: another way than auto takes
    over size, normalization and channels, and nothing else.
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
    ways: tuple[Way, ...] = ("squash",) if own.of_squares else ("crop", "squash", "pad")
    sides = sorted({plain.size, *own.sides}, key=lambda side: abs(side - plain.size))
    first: Interpolation = own.interpolation if own.interpolation in MODES else "bicubic"
    resizes = [
        replace(plain.resize, way=way, side=None if side == plain.size else side, interpolation=first)
        for side, way in product(sides, ways)
    ]
    apart, resize = _closest(plain, resizes, theirs, image)
    if apart > TOLERANCE:
        others = [replace(resize, interpolation=each) for each in MODES]
        apart, resize = _closest(plain, others, theirs, image)
    if apart > TOLERANCE:
        raise unlike(
            name, f"gives pixels that differ by {apart:.1f} of 255 levels on average from our nearest ({resize})"
        )
    return replace(plain, resize=resize)


def _closest(plain: ImageForm, resizes: list[Resize], theirs: Tensor, image: Image.Image) -> tuple[float, Resize]:
    """The first way of resizing within TOLERANCE, else the one that differs least, and its difference."""
    least, closest = math.inf, plain.resize
    for resize in resizes:
        apart = difference(replace(plain, resize=resize), theirs, image)
        if apart < least:
            least, closest = apart, resize
        if least <= TOLERANCE:
            break
    return least, closest


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
    """Mean, standard deviation and order of the channels from what became of black, white and orange.

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
    """The error, of one line, for an image processor that does what our pipeline does not."""
    reason = " ".join(reason.split())[:300]
    return InputError(
        f"{name}: its image processor {reason}; --resize crop, pad or squash trains it with images of our own form"
    )


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]
