"""Distinct texts of a step, each encoded once.

With class prompts most pairs of a large batch share their text. Encoding each once is exact while nothing in the text
tower is drawn at random: the gradient of a shared embedding is the sum of its pairs' gradients.
"""

import torch
from torch import Tensor, nn

from lib.backends.device import fork_rng
from lib.data import Chunk
from lib.data.batch import joined_rows
from lib.gradcache.prefetch import Inputs
from lib.gradcache.random_state import RandomState

TEXT_INPUTS = ("input_ids", "attention_mask", "text_pooled")


class DistinctTexts:
    """Collects the texts of a step's chunks; pairs of one text_id have the same text.

    pin: put what is made here into page-locked memory, for a GPU.
    """

    def __init__(self, pin: bool) -> None:
        self._chunks: list[Chunk] = []
        self._pin = pin
        self.row: Tensor | None = None
        """(B,), row of each pair's text among the distinct ones; set by `blocks`"""

    def take(self, chunk: Chunk) -> Inputs:
        """Collect the texts of a chunk, and return the inputs of its images."""
        self._chunks.append(chunk)
        return {name: tensor for name, tensor in chunk.inputs.items() if name not in TEXT_INPUTS}

    def blocks(self) -> list[Inputs]:
        """Split the distinct texts of all chunks into blocks of equal size, at most a chunk's number of pairs."""
        text_ids = torch.cat([chunk.text_id for chunk in self._chunks])
        distinct, self.row = torch.unique(text_ids, return_inverse=True)
        place = torch.arange(len(text_ids))
        first = torch.full((len(distinct),), len(text_ids)).scatter_reduce(0, self.row, place, "amin")
        inputs = [chunk.inputs for chunk in self._chunks]
        texts = {
            name: joined_rows(name, [each[name] for each in inputs])[first] for name in inputs[0] if name in TEXT_INPUTS
        }
        if self._pin:
            self.row = self.row.pin_memory()
            texts = {name: tensor.pin_memory() for name, tensor in texts.items()}
        count = -(-len(distinct) // max(map(len, self._chunks)))
        split = {name: tensor.tensor_split(count) for name, tensor in texts.items()}
        return [{name: parts[block] for name, parts in split.items()} for block in range(count)]


def text_count(inputs: Inputs) -> int:
    """Number of texts of one forward; 0 where it has none."""
    return next((len(inputs[name]) for name in ("input_ids", "text_pooled") if name in inputs), 0)


@torch.no_grad()
def same_every_time(towers: nn.Module, inputs: Inputs) -> bool:
    """True if the towers draw nothing at random for these inputs in training mode: no dropout is active.

    Random generators are compared, not embeddings: rare dropout, or dropout in adapters that start at 0, would not
    show in an embedding.
    """
    device = next(iter(inputs.values())).device
    with fork_rng(device):
        before = RandomState.capture(device)
        towers(**inputs)
        return before == RandomState.capture(device)
