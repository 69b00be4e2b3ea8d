"""How an image of any shape becomes a square one."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from lib.errors import InputError

Way = Literal["crop", "pad", "squash"]
ResizeFlag = Literal["auto", "crop", "pad", "squash"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Channels = Literal["rgb", "bgr"]

MODES: dict[Interpolation, InterpolationMode] = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "lanczos": InterpolationMode.LANCZOS,
    "nearest": InterpolationMode.NEAREST_EXACT,  # Pillow's
}


@dataclass(frozen=True)
class Resize:
    """The way from an image to a square: both sides resized, then the middle cut out or black bars put around it."""

    way: Way = "crop"
    """crop: the shorter side becomes `side`; pad: the longer side; squash: both."""
    side: int | None = None
    """Pixels; None: as many as the square has, so that pad and squash cut nothing off."""
    interpolation: Interpolation = "bicubic"
    """How pixels are computed from their neighbours; all but nearest take the mean where an image becomes smaller."""
    channels: Channels = "rgb"
    """Order of the channels in the pixels that the encoder gets."""

    def __post_init__(self) -> None:
        if self.way not in get_args(Way):
            raise InputError(f"--resize {self.way} is not one of {', '.join(get_args(Way))}")

    def __str__(self) -> str:
        side = f" to {self.side}" if self.side else ""
        return f"{self.way}{side}, {self.interpolation}, {self.channels.upper()}"

    def __call__(self, pixels: Tensor, size: int) -> Tensor:
        """An image (3, H, W), uint8, as a square (3, size, size); the channels keep their order."""
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
        if self.interpolation == "lanczos":  # of tensors only newer versions of torchvision know it
            image = functional.to_pil_image(pixels)
            return functional.pil_to_tensor(functional.resize(image, [height, width], MODES["lanczos"]))
        return functional.resize(pixels, [height, width], interpolation=MODES[self.interpolation], antialias=True)


def _middle(pixels: Tensor) -> Tensor:
    """The image without what a middle crop drops of a very long one.

    Resized as a whole, a line of 1 x 10,000 pixels would be 2.2 million pixels wide.
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
