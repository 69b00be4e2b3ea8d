"""Towers, images and evaluation sets that are small enough to check by hand, for tests of metrics."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lib.data.evaluation_set import EvaluationSet
from lib.data.images import BadImage
from lib.data.pipeline import ImagePipeline, Resize
from lib.towers.processing import Processing

PIPELINE = ImagePipeline(4)


class Output(NamedTuple):
    image_embeds: Tensor | None
    text_embeds: Tensor | None


class SmallTowers(nn.Module):
    """A linear map of pixels and one of the characters of a text, with dropout while training."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(48, 8, generator=generator))
        self.text = nn.Parameter(torch.randn(128, 8, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Sequential(nn.Dropout(0.5)).eval()

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None) -> Output:
        if pixel_values is not None:
            flat = pixel_values.flatten(1).float() / 255
            return Output(self._embeds(flat @ self.image), None)
        characters = nn.functional.one_hot(input_ids, 128).float() * attention_mask[..., None]
        return Output(None, self._embeds(characters.sum(1) @ self.text))

    def _embeds(self, pooled: Tensor) -> Tensor:
        return nn.functional.normalize(self.frozen(self.dropout(pooled)), dim=1)


class SmallImages:
    """Random pictures, drawn by number; some cannot be read."""

    def __init__(self, count: int, bad: dict[int, str]):
        self.keys, self.bad = [f"image {i}" for i in range(count)], bad

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent=None) -> Image.Image:
        if index in self.bad:
            raise BadImage(self.bad[index])
        pixels = np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def small_tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[ord(letter) for letter in text.ljust(longest)] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return ids, mask


def small_processing() -> Processing:
    class Small(Processing):
        def tokenize(self, texts):
            return small_tokenize(texts)

    return Small(None, 64, "longest", False, 4, (0.0,) * 3, (1.0,) * 3, Resize("crop"))


def captioned(count: int = 7, bad: dict[int, str] | None = None) -> EvaluationSet:
    """Image i has i % 3 captions, some identical to captions of other images."""
    images = [i for i in range(count) for _ in range(i % 3)]
    return EvaluationSet(
        name="small captions",
        images=SmallImages(count, bad or {}),
        group=np.arange(count) + 100,
        captions=[f"a caption {i % 4}" for i in range(len(images))],
        caption_image=np.array(images),
    )


def classed(count: int = 11, bad: dict[int, str] | None = None) -> EvaluationSet:
    return EvaluationSet(
        name="small classes",
        images=SmallImages(count, bad or {}),
        group=np.arange(count) % 3,
        labels=np.arange(count) % 3,
        classes=("ant", "bee", "cat", "no pictures"),
        templates=("a {}", "the photo of a {}"),
    )


def unit(*shape: int, seed: int = 0) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)
