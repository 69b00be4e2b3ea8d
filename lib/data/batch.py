"""Owns the unit that travels from the data to the towers: one chunk of pairs."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts to (input_ids, attention_mask), both (C, L) int64."""


@dataclass(frozen=True)
class Chunk:
    """One tower forward's worth of pairs of one rank: C pairs of an image and a text."""

    pixel_values: Tensor
    """(C, 3, H, W) uint8; normalized on the device, so that a batch stays small on the host."""
    input_ids: Tensor
    """(C, L) int64"""
    attention_mask: Tensor
    """(C, L) int64"""
    group: Tensor
    """(C,) int64; pairs of one group are positives of each other."""
    sample_id: Tensor
    """(C,) int64; stable hash of the pair's key."""

    def __len__(self) -> int:
        return len(self.sample_id)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Chunk":
        """The same chunk on another device."""
        return Chunk(*(tensor.to(device, non_blocking=non_blocking) for tensor in self._tensors()))

    def clone(self) -> "Chunk":
        """A copy with memory of its own."""
        return Chunk(*(tensor.clone() for tensor in self._tensors()))

    def pin_memory(self) -> "Chunk":
        """A copy in page-locked memory (called by torch's DataLoader)."""
        return Chunk(*(tensor.pin_memory() for tensor in self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]
