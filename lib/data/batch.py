"""Owns the unit that travels from the data to the towers: one chunk of pairs."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

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


class Pair(NamedTuple):
    """One image and one text, ready to be stacked into a chunk."""

    pixels: Tensor
    """(3, H, W) uint8"""
    text: str
    group: int
    sample_id: int


def assemble(pairs: list[Pair], tokenize: Tokenize) -> Chunk:
    """Stack pairs into a chunk."""
    # Prompts repeat: tokenizing the distinct texts only gives the same rows, the longest being the same.
    row_of_text = {text: row for row, text in enumerate(dict.fromkeys(pair.text for pair in pairs))}
    input_ids, attention_mask = tokenize(list(row_of_text))
    rows = torch.tensor([row_of_text[pair.text] for pair in pairs])
    return Chunk(
        pixel_values=torch.stack([pair.pixels for pair in pairs]),
        input_ids=input_ids[rows],
        attention_mask=attention_mask[rows],
        group=torch.tensor([pair.group for pair in pairs], dtype=torch.int64),
        sample_id=torch.tensor([pair.sample_id for pair in pairs], dtype=torch.int64),
    )
