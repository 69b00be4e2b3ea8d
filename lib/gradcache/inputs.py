"""The forwards of a step: chunk by chunk as these arrive, with the distinct texts encoded once, after the images.

With class prompts most pairs of a large batch share their text. Encoding each once is exact while nothing in the text
tower is drawn at random: the gradient of a shared embedding is the sum of its pairs'.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lib.backends.device import fork_rng
from lib.data.batch import joined_rows
from lib.gradcache.random_state import RandomState
from lib.losses.positives import Ids

Inputs = dict[str, Tensor]
"""Inputs of the towers' forward, by name."""

TEXT_INPUTS = ("input_ids", "attention_mask", "text_pooled")


class TowerChunk(Protocol):
    """One chunk of pairs (see lib.data.Chunk): group, sample_id and text_id (C,), and what the forward takes.

    `inputs` names pixel_values, or image_pooled where the image trunk is frozen and its output stored; and input_ids
    with attention_mask, or text_pooled. Pairs of one `text_id` have the same text.
    """

    @property
    def inputs(self) -> Inputs: ...
    @property
    def group(self) -> Tensor: ...
    @property
    def sample_id(self) -> Tensor: ...
    @property
    def text_id(self) -> Tensor: ...


class Chunks(Protocol):
    """A step's chunks: their number is known, each comes when it is ready, and they are taken once."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[TowerChunk]: ...


class Forward(NamedTuple):
    """The inputs of one forward of the towers."""

    inputs: Inputs
    is_chunk: bool
    """It has the images of a chunk: every rank has as many such forwards."""
    last: bool
    """No other follows in this step."""


@dataclass
class StepBatch:
    """A step's chunks as forwards, and what the loss needs of them once all have been there."""

    chunks: Chunks
    """of this rank"""
    negatives: Sequence[Inputs]
    """texts that belong to no pair, in chunks"""
    share: bool
    """encode each distinct text once"""
    pin: bool
    """put what is made here into page-locked memory"""
    ids: list[Ids] = field(default_factory=list)
    """of each chunk"""
    text_row: Tensor | None = None
    """(B,), which of the encoded texts each pair has; None: its own"""

    def forwards(self) -> Iterator[Forward]:
        """Each chunk's forward as soon as the chunk is there.

        The negatives come first. Where texts are shared, chunks give their images alone and the distinct texts follow.
        The last forward has both towers: ranks synchronize in its backward pass.
        """
        for inputs in self.negatives:
            yield Forward(inputs, is_chunk=False, last=False)
        texts: list[TowerChunk] = []
        for number, chunk in enumerate(self.chunks):
            self.ids.append(Ids.of(chunk))
            last = number == len(self.chunks) - 1
            if not self.share:
                yield Forward(chunk.inputs, is_chunk=True, last=last)
                continue
            texts.append(chunk)
            images = {name: tensor for name, tensor in chunk.inputs.items() if name not in TEXT_INPUTS}
            if not last:
                yield Forward(images, is_chunk=True, last=False)
        if texts:
            *blocks, final = self._distinct_texts(texts)
            for block in blocks:
                yield Forward(block, is_chunk=False, last=False)
            yield Forward(images | final, is_chunk=True, last=True)

    def _distinct_texts(self, chunks: Sequence[TowerChunk]) -> list[Inputs]:
        """Every text of the chunks once, in blocks of at most a chunk's pairs, as equal as can be."""
        text_ids = torch.cat([chunk.text_id for chunk in chunks])
        distinct, self.text_row = torch.unique(text_ids, return_inverse=True)
        place = torch.arange(len(text_ids))
        first = torch.full((len(distinct),), len(text_ids)).scatter_reduce(0, self.text_row, place, "amin")
        inputs = [chunk.inputs for chunk in chunks]
        texts = {
            name: joined_rows(name, [each[name] for each in inputs])[first] for name in TEXT_INPUTS if name in inputs[0]
        }
        if self.pin:
            self.text_row = self.text_row.pin_memory()
            texts = {name: tensor.pin_memory() for name, tensor in texts.items()}
        blocks = -(-len(distinct) // max(len(chunk.sample_id) for chunk in chunks))
        split = {name: tensor.tensor_split(blocks) for name, tensor in texts.items()}
        return [{name: parts[block] for name, parts in split.items()} for block in range(blocks)]


def text_count(inputs: Inputs) -> int:
    """Texts of one forward; 0 where it has none."""
    return next((len(inputs[name]) for name in ("input_ids", "text_pooled") if name in inputs), 0)


@torch.no_grad()
def same_every_time(towers: torch.nn.Module, inputs: Inputs) -> bool:
    """Whether the towers draw nothing at random for these inputs in training mode: no dropout in what runs.

    The generators tell, not the embeddings: what is dropped rarely, or in adapters that start at 0, would not show.
    """
    device = next(iter(inputs.values())).device
    with fork_rng(device):
        before = RandomState.capture(device)
        towers(**inputs)
        return before == RandomState.capture(device)
