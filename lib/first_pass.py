"""Pass 1 of the cached step: every chunk's embeddings, and what pass 2 needs to make the same again."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from lib.copies import on_device
from lib.replay import RandomState
from lib.shared_texts import Inputs
from lib.towers import TowerOutput

Recompute = Literal["all", "head", "none"]
"""What of a tower runs again in pass 2: all of it, only its head (frozen trunk), or nothing (frozen tower)."""


class Recomputed(TypedDict):
    """What of each tower runs again in pass 2, by the names that `cached_step` has for it."""

    image_recompute: Recompute
    text_recompute: Recompute


@dataclass
class ChunkPass:
    """A chunk's inputs, what pass 1 made of them, and the random state that it started from."""

    inputs: Inputs
    output: TowerOutput
    """With its graph where that is kept; else the embeddings are rows of EmbeddedBatch."""
    random_state: RandomState
    image_pooled: Tensor | None
    text_pooled: Tensor | None

    def inputs_of_pass_2(self, again: Recomputed) -> Inputs:
        """What has to run again."""
        wanted = {
            "pixel_values": again["image_recompute"] == "all",
            "input_ids": again["text_recompute"] == "all",
            "attention_mask": again["text_recompute"] == "all",
        }
        inputs = {name: tensor for name, tensor in self.inputs.items() if wanted.get(name)}
        pooled = {"image_pooled": self.image_pooled, "text_pooled": self.text_pooled}
        return inputs | {name: tensor for name, tensor in pooled.items() if tensor is not None}

    @torch.no_grad()
    def distance(self, output: TowerOutput) -> Tensor:
        """Largest absolute difference to the embeddings that pass 2 made: ()."""
        distances = [
            (again.detach() - first).abs().max().float()
            for first, again in (
                (self.output.image_embeds, output.image_embeds),
                (self.output.text_embeds, output.text_embeds),
            )
            if first is not None and again is not None
        ]
        return torch.stack(distances).max() if distances else torch.zeros((), device=self.output.logit_scale.device)


@dataclass(frozen=True)
class EmbeddedBatch:
    """What pass 1 leaves of this rank's chunks."""

    passes: list[ChunkPass]
    images: Tensor
    """(B, D), detached, in the order of the chunks"""
    texts: Tensor
    """(B, D), or the distinct texts; the negative texts' first"""


def embed_chunks(
    towers: nn.Module,
    inputs: Sequence[Inputs],
    device: torch.device,
    again: Recomputed,
    *,
    keep_graphs: int,
    together: int,
    no_sync: Callable[[], AbstractContextManager],
    between_chunks: Callable[[], None],
) -> EmbeddedBatch:
    """Embed every chunk, up to `together` of them in one forward; the first `keep_graphs` alone, and with their graph.

    `between_chunks` is called for every chunk but the first. Where all graphs are kept the last forward is outside
    `no_sync`, as the one backward through all of them will be.
    """
    passes: list[ChunkPass] = []
    images, texts = _Rows(sum(map(image_count, inputs))), _Rows(sum(map(text_count, inputs)))
    moved = on_device(inputs, device)
    for block in _blocks(inputs, keep_graphs, together):
        kept = block.start < keep_graphs
        # DDP decides in forward whether its backward will reduce: a kept graph reduces only if no other follows.
        last = kept and block.stop == len(inputs)
        for index in block:  # for each chunk: ranks may have different blocks, but as many chunks
            if index:
                between_chunks()
        random_state = RandomState.capture(device)
        with nullcontext() if last else no_sync(), nullcontext() if kept else torch.no_grad():
            output: TowerOutput = towers(**_joined([next(moved) for _ in block]))
        embeds = images.add(output.image_embeds), texts.add(output.text_embeds)
        if kept:
            passes.append(ChunkPass(inputs[block.start], _without_pooled(output), random_state, None, None))
        else:
            output = output._replace(image_embeds=embeds[0], text_embeds=embeds[1])
            passes += _divided(output, inputs[block.start : block.stop], random_state, again)
    return EmbeddedBatch(passes, images.everything, texts.everything)


class _Rows:
    """So many rows, filled in order: one piece of memory, and no rest of a chunk between the next one's activations."""

    def __init__(self, count: int) -> None:
        self.count, self.filled = count, 0
        self.everything = torch.empty(0)

    def add(self, rows: Tensor | None) -> Tensor | None:
        """A copy of the next rows (C, D), where they stay."""
        if rows is None:
            return None
        if not self.filled:
            self.everything = rows.new_empty(self.count, rows.shape[1], requires_grad=False)
        place = self.everything[self.filled : self.filled + len(rows)]
        self.filled += len(rows)
        return place.copy_(rows.detach())


def _blocks(inputs: Sequence[Inputs], keep_graphs: int, together: int) -> list[range]:
    """Which chunks pass 1 embeds in one forward: kept ones alone, of the others neighbours of the same form."""
    forms = [{name: tensor.shape[1:] for name, tensor in each.items()} for each in inputs]
    blocks: list[range] = []
    for index, form in enumerate(forms):
        joins = blocks and index > keep_graphs and len(blocks[-1]) < together and forms[index - 1] == form
        if joins:
            blocks[-1] = range(blocks[-1].start, index + 1)
        else:
            blocks.append(range(index, index + 1))
    return blocks


def _divided(
    output: TowerOutput, inputs: Sequence[Inputs], random_state: RandomState, again: Recomputed
) -> list[ChunkPass]:
    """The chunks of one forward. What the trunks gave is held only where pass 2 starts from it."""
    images = output.image_embeds, output.image_pooled if again["image_recompute"] == "head" else None
    texts = output.text_embeds, output.text_pooled if again["text_recompute"] == "head" else None
    passes, image_row, text_row = [], 0, 0
    for of_chunk in inputs:
        image_rows = slice(image_row, image_row := image_row + image_count(of_chunk))
        text_rows = slice(text_row, text_row := text_row + text_count(of_chunk))
        image_embeds, image_pooled = (None if part is None else part[image_rows] for part in images)
        text_embeds, text_pooled = (None if part is None else part[text_rows] for part in texts)
        own = _without_pooled(output)._replace(image_embeds=image_embeds, text_embeds=text_embeds)
        passes.append(ChunkPass(of_chunk, own, random_state, image_pooled, text_pooled))
    return passes


def _without_pooled(output: TowerOutput) -> TowerOutput:
    return output._replace(image_pooled=None, text_pooled=None)


def _joined(chunks: Sequence[Inputs]) -> Inputs:
    if len(chunks) == 1:
        return chunks[0]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def image_count(inputs: Inputs) -> int:
    """Images of one forward; 0 where it has none."""
    return _count(inputs, "pixel_values", "image_pooled")


def text_count(inputs: Inputs) -> int:
    """Texts of one forward; 0 where it has none."""
    return _count(inputs, "input_ids", "text_pooled")


def _count(inputs: Inputs, *names: str) -> int:
    return next((len(inputs[name]) for name in names if name in inputs), 0)
