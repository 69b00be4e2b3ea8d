"""Owns the last part of a pair's way: an image that can be opened and a text become what a tower reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lib.data.batch import Chunk, Tokenize
from lib.data.images import Extent
from lib.data.pipeline import ImagePipeline

OpenImage = Callable[[Extent], Image.Image]
"""Decodes an image, RGB and upright, at the extent or larger; raises BadImage."""


class Pair(NamedTuple):
    """One image and one text, ready to be stacked into a chunk."""

    pixels: Tensor
    """(3, H, W) uint8"""
    text: str
    group: int
    sample_id: int


@dataclass(frozen=True)
class Prepare:
    """What is done to every pair, alike for all sources; it travels to the workers."""

    images: ImagePipeline
    tokenize: Tokenize

    def pair(self, open_image: OpenImage, image_id: int, text: str, group: int, sample_id: int, seed: int) -> Pair:
        """Prepare one pair; raises BadImage.

        image_id: hash of the image's key. seed: 0 to 2**63 - 1, decides the augmentation.
        """
        return Pair(self.images(open_image(self.images.extent), seed), text, group, sample_id)

    def chunk(self, pairs: list[Pair]) -> Chunk:
        """Stack pairs into a chunk, their texts tokenized."""
        # Prompts repeat: tokenizing the distinct texts only gives the same rows, the longest being the same.
        row_of_text = {text: row for row, text in enumerate(dict.fromkeys(pair.text for pair in pairs))}
        input_ids, attention_mask = self.tokenize(list(row_of_text))
        rows = torch.tensor([row_of_text[pair.text] for pair in pairs])
        return Chunk(
            pixel_values=torch.stack([pair.pixels for pair in pairs]),
            input_ids=input_ids[rows],
            attention_mask=attention_mask[rows],
            group=torch.tensor([pair.group for pair in pairs], dtype=torch.int64),
            sample_id=torch.tensor([pair.sample_id for pair in pairs], dtype=torch.int64),
        )
