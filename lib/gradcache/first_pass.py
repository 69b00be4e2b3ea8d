"""Pass 1 of the cached step: every chunk's embeddings, and what pass 2 needs to make the same again."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from lib.gradcache.inputs import Forward, Inputs
from lib.gradcache.prefetch import on_device
from lib.gradcache.random_state import RandomState
from lib.towers import TowerOutput

Recompute = Literal["all", "head", "none"]
"""What of a tower runs again in pass 2: all of it, only its head (frozen trunk), or nothing (frozen tower)."""


class Recomputed(TypedDict):
    """What of each tower runs again in pass 2, by the names that `cached_step` has for it."""

    image_recompute: Recompute
    text_recompute: Recompute


@dataclass
class ChunkPass:
    """The inputs of a forward, what pass 1 made of them, and the random state that it started from."""

    inputs: Inputs
    is_chunk: bool
    """As in Forward."""
    output: TowerOutput
    """With its graph where that is kept; else its embeddings are rows of EmbeddedBatch."""
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
    """Results of pass 1 on this rank."""

    passes: list[ChunkPass]
    images: Tensor
    """(B, D), detached, in the order of the chunks"""
    texts: Tensor
    """(B, D), or the distinct texts; the negative texts' first"""


def embed_chunks(
    towers: nn.Module,
    forwards: Iterable[Forward],
    device: torch.device,
    again: Recomputed,
    *,
    keep_graphs: int | None,
    no_sync: Callable[[], AbstractContextManager],
    between_chunks: Callable[[], None],
) -> EmbeddedBatch:
    """Run one forward after another, each as soon as its inputs are there; the first `keep_graphs` with their graph.

    `keep_graphs` None: all with their graph; the last forward is then outside `no_sync`, as the one backward through
    all of them will be. `between_chunks` is called for every chunk but the first.
    """
    passes: list[ChunkPass] = []
    chunks = 0
    for forward, inputs in on_device(forwards, lambda forward: forward.inputs, device):
        kept = keep_graphs is None or len(passes) < keep_graphs
        if forward.is_chunk:  # as many on every rank
            if chunks:
                between_chunks()
            chunks += 1
        random_state = RandomState.capture(device)
        # DDP decides in forward whether its backward will reduce: a kept graph reduces only if no other follows.
        reduces = keep_graphs is None and forward.last
        with nullcontext() if reduces else no_sync(), nullcontext() if kept else torch.no_grad():
            output: TowerOutput = towers(**inputs)
        # What the trunks gave is held only where pass 2 starts from it.
        image_pooled = None if kept or again["image_recompute"] != "head" else output.image_pooled
        text_pooled = None if kept or again["text_recompute"] != "head" else output.text_pooled
        output = output._replace(image_pooled=None, text_pooled=None)
        passes.append(ChunkPass(forward.inputs, forward.is_chunk, output, random_state, image_pooled, text_pooled))
        del inputs
    images = _together(passes, "image_embeds", kept=len(passes) if keep_graphs is None else keep_graphs)
    texts = _together(passes, "text_embeds", kept=len(passes) if keep_graphs is None else keep_graphs)
    return EmbeddedBatch(passes, images, texts)


def _together(passes: list[ChunkPass], name: Literal["image_embeds", "text_embeds"], kept: int) -> Tensor:
    """All embeddings of one tower, detached, in one tensor, of which those without a graph become views."""
    embeds = [getattr(each.output, name) for each in passes]
    everything = torch.cat([part.detach() for part in embeds if part is not None])
    start = 0
    for number, part in enumerate(embeds):
        if part is not None:
            if number >= kept:
                rows = everything[start : start + len(part)]
                passes[number].output = passes[number].output._replace(**{name: rows})
            start += len(part)
    return everything
