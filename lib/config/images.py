"""What is done to images before the model sees them."""

from dataclasses import dataclass
from typing import Literal

from lib.config.settings import Settings

LARGEST_SIDE = 4096  # pixels; a slip of the finger above it asks for more memory than there is


@dataclass(frozen=True)
class Images(Settings):
    """What is done to images before the model sees them."""

    image_size: int | None = None
    """Side of the images in pixels, where the model leaves a choice; None: the model's own. A larger side that
    images are resized to before their middle is cut out grows or shrinks with it."""
    resize: Literal["auto", "crop", "pad", "squash"] = "auto"
    """How images become square; auto: as the model's own image processor does it, interpolation included, or an error;
    crop, pad, squash: to --image-size or the model's size at once, bicubic."""
    augment: Literal["none", "light", "jitter", "strong"] = "none"
    """Image augmentation; light: flip and mild crop, jitter: colour, strong: both with rotation and RandAugment."""
    crop_scale: tuple[float, float] = (0.7, 1.0)
    """Part of the area that a random crop keeps, least and most (light, strong)."""
    flip: float = 0.5
    """Probability of a horizontal flip (light, strong)."""
    color_jitter: tuple[float, float, float, float] = (0.2, 0.2, 0.2, 0.1)
    """Largest change of brightness, contrast, saturation and hue (jitter, strong)."""
    rotation: float = 10.0
    """Largest rotation in degrees (strong)."""
    randaugment: tuple[int, int] = (2, 9)
    """Operations of RandAugment and their magnitude, 0 to 30 (strong)."""

    def faults(self) -> list[str]:
        """As in Settings; the image pipeline checks what it takes itself."""
        found = super().faults() + self.at_least_one("image_size")
        if self.image_size is not None and self.image_size > LARGEST_SIDE:
            found.append(f"--image-size {self.image_size} must be at most {LARGEST_SIDE} pixels")
        return found
