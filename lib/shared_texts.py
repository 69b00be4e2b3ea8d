"""The distinct texts of a step, encoded once: with class prompts most pairs of a large batch share their text.

Exact while nothing in the text tower is drawn at random: the gradient of a shared embedding is the sum of its pairs'.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lib.replay import RandomState

Inputs = dict[str, Tensor]
"""What the towers' forward takes, by name."""

TEXT_INPUTS = ("input_ids", "attention_mask", "text_pooled")


class TextChunk(Protocol):
    """Pairs of one tower forward (see lib.data.Chunk): what the forward takes by name, and text_id (C,)."""

    @property
    def inputs(self) -> Inputs: ...
    @property
    def text_id(self) -> Tensor | None: ...


def share_texts(chunks: Sequence[TextChunk]) -> tuple[list[Inputs], Tensor | None]:
    """The chunks' inputs with every text once, and which of these texts each of the B pairs has: (B,) int64.

    As many inputs as chunks; the images stay where they are, and the texts fill the last ones, so that the last, in
    whose backward pass ranks synchronize, has both towers. None where the texts are all different.
    """
    inputs = [chunk.inputs for chunk in chunks]
    known = [chunk.text_id for chunk in chunks if chunk.text_id is not None]
    if len(known) < len(chunks):
        return inputs, None
    text_ids = torch.cat(known)
    distinct, text_row = torch.unique(text_ids, return_inverse=True)
    size = len(known[0])
    blocks = -(-len(distinct) // size)
    if len(distinct) == len(text_ids):
        return inputs, None
    first = torch.full((len(distinct),), len(text_ids)).scatter_reduce(0, text_row, torch.arange(len(text_ids)), "amin")
    texts = {name: _joined(name, [each[name] for each in inputs])[first] for name in TEXT_INPUTS if name in inputs[0]}
    shared = [{name: tensor for name, tensor in each.items() if name not in TEXT_INPUTS} for each in inputs]
    for block in range(blocks):
        rows = slice(block * size, (block + 1) * size)
        shared[len(chunks) - blocks + block] |= {name: tensor[rows] for name, tensor in texts.items()}
    return shared, text_row


@torch.no_grad()
def same_every_time(towers: torch.nn.Module, inputs: Inputs) -> bool:
    """Whether the towers draw nothing at random for these inputs in training mode: no dropout in what runs.

    The generators tell, not the embeddings: what is dropped rarely, or in adapters that start at 0, would not show.
    """
    device = next(iter(inputs.values())).device
    with torch.random.fork_rng():
        before = RandomState.capture(device)
        towers(**inputs)
        return before == RandomState.capture(device)


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Concatenate rows. Token rows of chunks with shorter texts are lengthened by what ends them, under a zero mask."""
    longest = max(part.shape[1] for part in parts)
    lengthened = []
    for part in parts:
        missing = longest - part.shape[1]
        end = torch.zeros_like(part[:, -1:]) if name == "attention_mask" else part[:, -1:]
        lengthened.append(torch.cat([part, end.expand(-1, missing)], dim=1) if missing else part)
    return torch.cat(lengthened)
