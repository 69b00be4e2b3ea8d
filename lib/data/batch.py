"""Owns the unit that travels from the data to the towers: one chunk of pairs."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts to (input_ids, attention_mask), both (C, L) int64."""


@dataclass(frozen=True)
class Chunk:
    """One tower forward's worth of pairs of one rank: C pairs of an image and a text.

    A tower whose trunk is frozen may have its stored outputs here instead of its inputs, which are None then.
    """

    pixel_values: Tensor | None
    """(C, 3, H, W) uint8; normalized on the device, so that a batch stays small on the host."""
    input_ids: Tensor | None
    """(C, L) int64"""
    attention_mask: Tensor | None
    """(C, L) int64"""
    group: Tensor
    """(C,) int64; pairs of one group are positives of each other."""
    sample_id: Tensor
    """(C,) int64; stable hash of the pair's key."""
    text_id: Tensor | None = None
    """(C,) int64; hash of the text: pairs of one text_id have the same."""
    image_pooled: Tensor | None = None
    """(C, H) float32, what the image trunk made of the pixels"""
    text_pooled: Tensor | None = None
    """(C, H) float32, what the text trunk made of the tokens"""

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the towers' forward takes, by name."""
        tensors = self._tensors()
        return {name: tensor for name, tensor in tensors.items() if name not in ("group", "sample_id", "text_id")}

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Chunk":
        """The same chunk on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def clone(self) -> "Chunk":
        """A copy with memory of its own."""
        return self._each(torch.clone)

    def pin_memory(self) -> "Chunk":
        """A copy in page-locked memory (called by torch's DataLoader)."""
        return self._each(torch.Tensor.pin_memory)

    def rows(self, start: int, stop: int) -> "Chunk":
        """Some of the pairs."""
        return self._each(lambda tensor: tensor[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Chunk":
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}
