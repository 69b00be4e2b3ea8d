"""Owns the way from a decoded image to the pixels a tower sees: resize, crop, augmentation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lib.data.images import Extent
from lib.errors import InputError

Resize = Literal["crop", "pad", "squash"]
Augment = Literal["none", "light", "jitter", "strong"]


@dataclass(frozen=True)
class ImagePipeline:
    """Turns an RGB image into uint8 pixels (3, size, size); a pure function of image and seed."""

    size: int
    """Pixels on a side."""
    resize: Resize = "crop"
    """crop: shorter side to `size`, middle kept; pad: longer side to `size`, black bars; squash: both."""
    augment: Augment = "none"
    """light: flip and mild random crop; jitter: colours; strong: both, small rotations and RandAugment."""

    def __post_init__(self):
        if self.size < 1:
            raise InputError(f"--image-size {self.size} must be at least 1 pixel")
        if self.resize not in get_args(Resize):
            raise InputError(f"resize {self.resize!r} is not one of {', '.join(get_args(Resize))}")
        if self.augment not in get_args(Augment):
            raise InputError(f"--augment {self.augment} is not one of {', '.join(get_args(Augment))}")

    @property
    def extent(self) -> Extent:
        """How small an image may be decoded before it comes here."""
        return Extent(self.size, "longer" if self.resize == "pad" else "shorter")

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Pixels of one image, uint8 (3, size, size); `seed`, 0 to 2**63 - 1, decides the augmentation."""
        if self.augment == "none":
            return _pixels(self._resized(image))
        # torchvision draws from torch's global generator: it is put back afterwards, and only the CPU's is
        # seeded, because torch.manual_seed would also reseed the GPU's, from which dropout draws.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if self.augment == "jitter":
                return _pixels(self._colours(self._resized(image)))
            # A random crop of the whole image has the middle crop's place.
            framed = image if self.resize == "crop" else self._resized(image)
            augmented = self._frame(framed)
            return _pixels(augmented if self.augment == "light" else self._strong(self._colours(augmented)))

    def _resized(self, image: Image.Image) -> Image.Image:
        if image.size == (self.size, self.size):
            return image
        if self.resize == "squash":
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return self._cropped(image) if self.resize == "crop" else self._padded(image)

    def _cropped(self, image: Image.Image) -> Image.Image:
        """The middle of the image with its shorter side resized, as if cropped after resizing.

        Asking for the middle in the source's coordinates never holds the resized whole, which for a line of
        1 x 10,000 pixels would be 2.2 million pixels wide.
        """
        shorter, longer = sorted(image.size)
        resized_longer = int(self.size * longer / shorter)
        offset = (resized_longer - self.size) // 2
        scale = longer / resized_longer
        near, far = offset * scale, min((offset + self.size) * scale, longer)
        box = (near, 0, far, shorter) if image.width >= image.height else (0, near, shorter, far)
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)

    def _padded(self, image: Image.Image) -> Image.Image:
        scale = self.size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        square = Image.new("RGB", (self.size, self.size))
        inner = image.resize((width, height), Image.Resampling.BICUBIC)
        square.paste(inner, ((self.size - width) // 2, (self.size - height) // 2))
        return square

    # Augmentations work on Pillow images: as fast as tensors at these sizes, and Pillow's sums do not depend
    # on the number of threads, so that a worker and the main process get the same bits.

    @cached_property
    def _frame(self) -> v2.Transform:
        crop = v2.RandomResizedCrop(self.size, scale=(0.7, 1.0), ratio=(0.8, 1.25), interpolation=_BICUBIC)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])

    @cached_property
    def _colours(self) -> v2.Transform:
        return v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)

    @cached_property
    def _strong(self) -> v2.Transform:
        """Small rotations and RandAugment (Cubuk et al., 2020)."""
        return v2.Compose([v2.RandomRotation(10, interpolation=_BILINEAR), v2.RandAugment()])


_BICUBIC = v2.InterpolationMode.BICUBIC
_BILINEAR = v2.InterpolationMode.BILINEAR


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
