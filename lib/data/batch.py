"""The chunk of pairs, which travels from the data to the towers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts to (input_ids, attention_mask), both (C, L) int64."""


def joined_rows(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Concatenate rows of the tensor of that name. Shorter rows of tokens are padded: by their last token, masked.

    A row that is the longest of its part ends with the end token, and no tower looks beyond that.
    """
    if len(parts) == 1:
        return parts[0]
    if name not in ("input_ids", "attention_mask"):
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([padded_to(name, part, longest) for part in parts])


def padded_to(name: str, tokens: Tensor, length: int) -> Tensor:
    """input_ids or attention_mask (C, L) as (C, length), at least as long; see `joined_rows`."""
    missing = length - tokens.shape[1]
    if not missing:
        return tokens
    end = torch.zeros_like(tokens[:, -1:]) if name == "attention_mask" else tokens[:, -1:]
    return torch.cat([tokens, end.expand(-1, missing)], dim=1)


@dataclass(frozen=True)
class Chunk:
    """C pairs of an image and a text, the input of one forward of the towers on one rank.

    For a tower with a frozen trunk it may hold the trunk's stored outputs instead of the inputs, which are None then.
    """

    pixel_values: Tensor | None
    """(C, 3, H, W) uint8; normalized on the device: float32 would take four times the memory on the host"""
    input_ids: Tensor | None
    """(C, L) int64"""
    attention_mask: Tensor | None
    """(C, L) int64"""
    group: Tensor
    """(C,) int64; pairs of one group are positives of each other"""
    sample_id: Tensor
    """(C,) int64, hash of the pair's key: the memory recognizes a stale copy of the same sample by it"""
    text_id: Tensor
    """(C,) int64, hash of the text: equal texts have equal ids"""
    image_pooled: Tensor | None = None
    """(C, H) float32, stored output of the image trunk"""
    text_pooled: Tensor | None = None
    """(C, H) float32, stored output of the text trunk"""

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs of the towers' forward, by name."""
        tensors = self._tensors()
        return {name: tensor for name, tensor in tensors.items() if name not in ("group", "sample_id", "text_id")}

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Chunk":
        """The same chunk on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    @property
    def images(self) -> Tensor:
        """Pixels, or the stored outputs in their place: (C, ...)."""
        images = self.image_pooled if self.pixel_values is None else self.pixel_values
        assert images is not None, "a pair has an image"
        return images

    def moved(self, images: Tensor) -> "Chunk":
        """Copy the pairs to memory of their own, their images into this tensor."""
        images.copy_(self.images)
        return self._each(lambda tensor: images if tensor is self.images else tensor.clone())

    def pin_texts(self) -> "Chunk":
        """The same pairs with all tensors except the images in page-locked memory."""
        tensors = {name: tensor for name, tensor in self._tensors().items() if tensor is not self.images}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})

    def rows(self, start: int, stop: int) -> "Chunk":
        """The pairs `start` to `stop` - 1."""
        return self._each(lambda tensor: tensor[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Chunk":
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}


def joined(chunks: Sequence[Chunk], images: Tensor) -> Chunk:
    """Join chunks whose images lie one after another in this tensor already."""
    tensors = [chunk._tensors() for chunk in chunks]
    rows = {
        name: images if tensor is chunks[0].images else joined_rows(name, [each[name] for each in tensors])
        for name, tensor in tensors[0].items()
    }
    return replace(chunks[0], **rows)
