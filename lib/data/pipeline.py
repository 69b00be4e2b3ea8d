"""From a decoded image to the pixels that a tower sees: resize, crop, augmentation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from lib.data.images import MAX_PIXELS, BadImage, Extent
from lib.errors import InputError, RunError

OpenImage = Callable[[Extent], Image.Image]
"""Decodes an image, RGB and upright, at the extent or larger; raises BadImage."""

Augment = Literal["none", "crop", "light", "jitter", "strong"]
Way = Literal["crop", "pad", "squash"]
ResizeFlag = Literal["auto", "crop", "pad", "squash"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Channels = Literal["rgb", "bgr"]

CROP_SCALE = (0.5, 1.0)  # part of the area that a random crop keeps, least and most
COLOR_JITTER = (0.2, 0.2, 0.2, 0.1)  # largest change of brightness, contrast, saturation and hue
ROTATION = 10.0  # degrees, at most
RANDAUGMENT = (2, 9)  # operations and their magnitude

MODES: dict[Interpolation, InterpolationMode] = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "lanczos": InterpolationMode.LANCZOS,
    "nearest": InterpolationMode.NEAREST_EXACT,  # Pillow's
}


@dataclass(frozen=True)
class Resize:
    """Makes an image square: resizes both sides, then cuts out the middle or puts black bars around it."""

    way: Way = "crop"
    """crop: the shorter side becomes `side`; pad: the longer side; squash: both."""
    side: int | None = None
    """Pixels; None: the side of the square, so that pad and squash cut nothing off."""
    interpolation: Interpolation = "bicubic"
    """All but nearest average over the source pixels where an image becomes smaller."""
    channels: Channels = "rgb"
    """Order of the channels in the pixels that the encoder gets."""

    def __post_init__(self) -> None:
        if self.way not in get_args(Way):
            raise InputError(f"--resize {self.way} is not one of {', '.join(get_args(Way))}")

    def __str__(self) -> str:
        side = f" to {self.side}" if self.side else ""
        return f"{self.way}{side}, {self.interpolation}, {self.channels.upper()}"

    def __call__(self, pixels: Tensor, size: int) -> Tensor:
        """Make an image (3, H, W), uint8, square (3, size, size); the channels keep their order."""
        side = self.side or size
        if self.way == "crop":
            pixels = _middle(pixels)
        height, width = pixels.shape[1:]
        if self.way == "squash":
            return _centered(self._to(pixels, side, side), size)
        reference = (min if self.way == "crop" else max)(height, width)
        return _centered(self._to(pixels, *(max(1, side * each // reference) for each in (height, width))), size)

    def _to(self, pixels: Tensor, height: int, width: int) -> Tensor:
        if pixels.shape[1:] == (height, width):
            return pixels
        if self.interpolation == "lanczos":  # on tensors only in newer versions of torchvision
            image = functional.to_pil_image(pixels)
            return functional.pil_to_tensor(functional.resize(image, [height, width], MODES["lanczos"]))
        return functional.resize(pixels, [height, width], interpolation=MODES[self.interpolation], antialias=True)


def _middle(pixels: Tensor) -> Tensor:
    """Cut the ends off a very long image, which the middle crop would drop anyway.

    Resized as a whole, an image of 1 x 10,000 pixels would become 2.2 million pixels wide.
    """
    longer, shorter = sorted(pixels.shape[1:], reverse=True)
    if longer <= 8 * shorter:
        return pixels
    kept = 8 * shorter + (longer % 2)  # as odd or even as the image: the middle stays the middle
    return functional.center_crop(pixels, [min(side, kept) for side in pixels.shape[1:]])


def _centered(pixels: Tensor, size: int) -> Tensor:
    """The middle square, with black bars where the pixels do not reach; placed as transformers places it."""
    height, width = pixels.shape[1:]
    top, left = max(0, (height - size) // 2), max(0, (width - size) // 2)
    pixels = pixels[:, top : top + size, left : left + size]
    above, before = ((size - side) // 2 for side in pixels.shape[1:])
    below, after = (size - side - (size - side) // 2 for side in pixels.shape[1:])
    return functional.pad(pixels, [before, above, after, below]) if above or before or below or after else pixels


@dataclass(frozen=True)
class ImagePipeline:
    """Turns an RGB image into uint8 pixels (3, size, size); a pure function of image and seed, as resuming needs."""

    size: int
    """Pixels on a side."""
    resize: Resize | Way = "crop"
    """A way alone resizes to `size`, bicubic."""
    augment: Augment = "none"
    """crop: a mild random crop; light: with a horizontal flip; jitter: colours; strong: all of these with rotation and
    RandAugment."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"--image-size {self.size} must be at least 1 pixel")
        if isinstance(self.resize, str):
            Resize(self.resize)  # refuses an unknown way
        if self.augment not in get_args(Augment):
            raise InputError(f"--augment {self.augment} is not one of {', '.join(get_args(Augment))}")

    @property
    def extent(self) -> Extent:
        """Size at which an image may be decoded before it comes here, since JPEG decodes faster at a reduced scale.

        Without augmentation twice the size: at 224, COCO photographs enlarged to 1,600 pixels then differ from fully
        decoded ones by 0.4 of 255, averaged over pixels and images (0.3 squashed or padded; 2.1 at once the size).
        With random crops, enough that the smallest square crop is not enlarged: such crops differ by 1.9.
        Nearest-pixel interpolation picks pixels of the full image.
        """
        side = self._square.side or self.size
        if self._square.interpolation == "nearest":
            side = MAX_PIXELS
        elif self.augment == "none":
            side *= 2
        elif self._crops_whole_image:
            side = int(self.size / sqrt(CROP_SCALE[0]))
        return Extent(side, "longer" if self._square.way == "pad" else "shorter")

    @cached_property
    def _square(self) -> Resize:
        return Resize(self.resize) if isinstance(self.resize, str) else self.resize

    @property
    def _crops_whole_image(self) -> bool:
        """A random crop of the whole image has the middle crop's place."""
        return self.augment in ("crop", "light", "strong") and self._square.way == "crop"

    def read(self, open_image: OpenImage, seed: int) -> Tensor:
        """Pixels of the image that `open_image` decodes; raises BadImage.

        Any other error of the file or its decoder becomes BadImage too: one image must not end a run.
        """
        try:
            image = open_image(self.extent)
        except Exception as error:
            if isinstance(error, BadImage | InputError | RunError):
                raise
            raise BadImage("unreadable") from error
        return self(image, seed)

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Pixels of one image, uint8 (3, size, size); `seed`, 0 to 2**63 - 1, decides the augmentation."""
        # torch resizes uint8 pixels in a third of Pillow's time, and in integers: the same bits with any number of
        # threads, with AVX2 or without it, and in transformers' image processor.
        pixels = self._augmented(functional.pil_to_tensor(image), seed)
        return (pixels.flip(0) if self._square.channels == "bgr" else pixels).contiguous()

    def _augmented(self, pixels: Tensor, seed: int) -> Tensor:
        if self.augment == "none":
            return self._square(pixels, self.size)
        # torchvision draws from torch's global generator, which is restored afterwards. Only the CPU's is seeded:
        # torch.manual_seed would also reseed the GPU's, from which dropout draws.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if self.augment == "jitter":
                return _on_pillow(self._colours, self._square(pixels, self.size))
            framed = self._framed(pixels)
            return framed if self.augment in ("crop", "light") else _on_pillow(self._strong, framed)

    def _framed(self, pixels: Tensor) -> Tensor:
        """A random crop, flipped or not, of the area that a middle crop could show."""
        if not self._crops_whole_image:
            pixels = self._square(pixels, max(self.size, self._square.side or 0))
        on_tensors = self._square.interpolation != "lanczos"
        return self._frame(pixels) if on_tensors else _on_pillow(self._frame, pixels)

    @cached_property
    def _frame(self) -> v2.Transform:
        mode = MODES[self._square.interpolation]
        crop = v2.RandomResizedCrop(self.size, scale=CROP_SCALE, ratio=(0.8, 1.25), interpolation=mode)
        return crop if self.augment == "crop" else v2.Compose([crop, v2.RandomHorizontalFlip()])

    @cached_property
    def _colours(self) -> v2.Transform:
        return v2.ColorJitter(*COLOR_JITTER)

    @cached_property
    def _strong(self) -> v2.Transform:
        """Colours, small rotations and RandAugment (Cubuk et al., 2020)."""
        rotate = v2.RandomRotation(ROTATION, interpolation=MODES["bilinear"])
        return v2.Compose([self._colours, rotate, v2.RandAugment(*RANDAUGMENT)])


def _on_pillow(transform: v2.Transform, pixels: Tensor) -> Tensor:
    """Colours and rotations take a third less time on Pillow images than on tensors."""
    return functional.pil_to_tensor(transform(functional.to_pil_image(pixels)))
