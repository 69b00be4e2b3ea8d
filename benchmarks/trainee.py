"""Towers of a subject with a run's chunk size, memory and steps on a GPU."""

from collections.abc import Callable
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from floor import ours
from subjects import SUBJECTS, Autocast, make_batch, make_towers, repeated_chunks
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from lib.backends.device import free_memory
from lib.losses import Pairs
from lib.losses.tiles import tile_side
from lib.setup.chunk_memory import ChunkMemory, largest_that_fits, memory_of_chunk
from lib.setup.plan import MARGIN, embedding_bytes


class Trainee:
    """Towers and their optimizer."""

    def __init__(self, subject: str, device: torch.device) -> None:
        self.subject, self.device = subject, device
        self.towers = Autocast(make_towers(subject, device), device)
        self.optimizer = AdamW(self.towers.parameters(), lr=1e-4, fused=True)
        self.state_bytes = 4 * sum(parameter.nbytes for parameter in self.towers.parameters())

    def largest_chunk(self, batch: int, room: float | None = None) -> int:
        """Chunk size of --chunk-size auto on a GPU with `room` bytes (default: all free memory); small on a CPU."""
        if self.device.type != "cuda":
            return min(16, batch)
        weights = self.state_bytes // 4
        taken = embedding_bytes(batch, batch, SUBJECTS[self.subject].embed_dim, tile_side(self.device))
        free = free_memory(self.device) if room is None else min(room, free_memory(self.device)) - weights
        return largest_that_fits(self.memory, min(batch, 4096), MARGIN * (free - 3 * weights - taken))

    def memory(self, pairs: int) -> ChunkMemory:
        """Measured memory of a chunk; one byte on a CPU, where nothing is measured."""
        if self.device.type != "cuda":
            return ChunkMemory(1, 1)
        inputs = make_batch(self.subject, 4).to(self.device).inputs
        with torch.autocast(self.device.type, torch.bfloat16):
            return memory_of_chunk(self.towers.towers, inputs, self.device, pairs)

    def chunks(self, size: int, chunk_size: int) -> list:
        """Equal chunks that share random pairs; in page-locked memory for a GPU."""
        chunk = make_batch(self.subject, ceil(size / ceil(size / chunk_size)), pin=self.device.type == "cuda")
        return repeated_chunks(chunk, size)

    def step(self, chunks: list, memory: Pairs) -> None:
        """A cached step with a memory bank, and the update."""
        self.update(partial(ours, remembered=memory), chunks)

    def update(self, gradients: Callable, chunks: list) -> None:
        """Compute gradients in the given way, clip them, and update the weights."""
        try:
            gradients(self.towers, chunks)
            clip_grad_norm_(self.towers.parameters(), 1.0)
            self.optimizer.step()
        finally:  # after running out of memory they would count for the next way
            self.optimizer.zero_grad()


def remembered(size: int, dimension: int, device: torch.device, first_id: int = 10**9) -> Pairs:
    """Random remembered pairs that do not occur in a batch."""
    generator = torch.Generator(device).manual_seed(first_id)
    embeds = (F.normalize(torch.randn(size, dimension, generator=generator, device=device), dim=1) for _ in range(2))
    ids = torch.arange(size, device=device) + first_id
    zeros = torch.zeros(size, device=device)
    return Pairs(*embeds, ids, ids, ids, image_normalizer=zeros, text_normalizer=zeros)
