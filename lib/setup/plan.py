"""The plan of a run: chunk size, kept graphs, and the memory they take on the device and on the host.

Letters: N pairs in a step, W ranks, B = N / W pairs of a rank, C pairs in a chunk, K chunks, Q remembered pairs,
D dimensions. Bytes are those of one rank. Memory is measured on an accelerator; on a CPU, where running out of memory
kills the process, it is estimated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Literal

import torch

from lib.backends import Backend
from lib.backends.device import device_faults_reported, free_memory, total_memory
from lib.config import FittedConfig
from lib.distributed import gather_objects, local_ranks
from lib.errors import InputError
from lib.gradcache.distinct_texts import TEXT_INPUTS, same_every_time
from lib.gradcache.prefetch import Inputs
from lib.losses.tiles import TILE, tile_side
from lib.setup.chunk_memory import (
    LARGEST_CHUNK,
    ChunkMemory,
    even_chunk,
    largest_chunk,
    largest_chunk_below,
    largest_that_fits,
    measure_activations,
    memory_of_chunk,
    peak_or_none,
)
from lib.towers import TwoTowers
from lib.towers.trunk_options import compile_trunks

INPUT_COPIES = 1 + 4  # of the bytes of the pixels: as they came, and normalized to float32
COMPILER: Literal["inductor", "aot_eager"] = "inductor"  # aot_eager only traces: tests need no C++ compiler
MARGIN = 0.85  # of the free memory: fragmentation, and kernels that need more workspace for other shapes
MOST_REPEATS = 8  # of a pair, above which a batch or a memory is not merely large but useless


@dataclass(frozen=True)
class BatchPlan:
    """The numbers of one optimizer step."""

    effective_batch: int
    """N"""
    world_size: int
    """W"""
    chunk_size: int
    """C, the most pairs of a forward"""
    keep_graphs: int
    xbm_size: int
    """Q"""
    embed_dim: int
    """D"""
    image_bytes: int
    """Bytes of one image as it comes from the data."""
    graph_bytes: int
    """Activations that autograd keeps of one chunk."""
    chunk_bytes: int
    """Peak of one chunk's forward and backward, its inputs included."""
    state_bytes: int
    """Weights, gradients and optimizer state."""
    tile: int = TILE
    """Rows and columns of the logits that the loss holds at a time."""
    chunks_ahead: int = 0
    """Chunks of the next step that the host reads meanwhile."""

    @property
    def per_rank(self) -> int:
        """B"""
        return self.effective_batch // self.world_size

    @property
    def chunks(self) -> int:
        """K, chunks of one rank in a step."""
        return ceil(self.per_rank / self.chunk_size)

    @property
    def chunk_pairs(self) -> int:
        """Pairs in the largest chunk: the K chunks are as equal as can be."""
        return ceil(self.per_rank / self.chunks)

    @property
    def embedding_bytes(self) -> int:
        """Embeddings, their gradients, the memory bank, and the loss's tiles."""
        return embedding_bytes(self.effective_batch, self.xbm_size, self.embed_dim, self.tile)

    @property
    def device_bytes(self) -> int:
        """Predicted peak on the device, beside the framework itself; the next chunk's images wait there too."""
        kept = min(self.keep_graphs, self.chunks - 1) * self.graph_bytes
        waiting = self.chunk_pairs * self.image_bytes
        return self.state_bytes + self.embedding_bytes + self.chunk_bytes + kept + waiting

    @property
    def pixel_bytes(self) -> int:
        """Host memory of the images of a step and of those read ahead."""
        return (self.chunks + self.chunks_ahead) * self.chunk_pairs * self.image_bytes

    def lines(self, positives: str = "") -> list[str]:
        """The batch and its memory, for the start-up plan; positives: a clause about the candidates."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        kept = f", {_counted(self.keep_graphs, 'graph')} kept" if self.keep_graphs else ""
        return [
            f"batch      {self.effective_batch:,} pairs a step: {ranks} x {self.per_rank:,} pairs in "
            f"{_counted(self.chunks, 'chunk')} of {self.chunk_pairs:,}{kept}",
            f"negatives  {self.effective_batch - 1:,} fresh and {self.xbm_size:,} remembered negatives per anchor"
            f"{positives}",
            f"memory     about {gigabytes(self.device_bytes)} on the device (weights and optimizer "
            f"{gigabytes(self.state_bytes)}, embeddings and loss {gigabytes(self.embedding_bytes)}, activations "
            f"{gigabytes(self.device_bytes - self.state_bytes - self.embedding_bytes)})",
        ]


def make_plan(
    config: FittedConfig, backend: Backend, towers: TwoTowers, inputs: Inputs, image_bytes: int, resumed: dict | None
) -> BatchPlan:
    """Choose chunk size and kept graphs, the same on all ranks; with --compile the trunks are compiled here.

    towers: not yet wrapped. inputs: of a forward of a few pairs, on the device. image_bytes: of one image as it comes
    from the data. resumed: `progress` of the checkpoint: what was measured then holds, so that dropout's masks and the
    order of sums stay the same. Raises InputError for a batch whose embeddings alone do not fit.
    """
    device, world_size = backend.accelerator.device, backend.accelerator.num_processes
    tile = tile_side(device)
    embeddings = embedding_bytes(config.effective_batch, config.xbm_size, towers.embed_dim, tile)
    if embeddings > total_memory(device):
        raise InputError(
            f"--effective-batch {config.effective_batch} and --xbm-size {config.xbm_size} take "
            f"{gigabytes(embeddings)} for embeddings alone, and {device.type} has "
            f"{gigabytes(total_memory(device))}; lower them"
        )
    chunk_size, keep = config.chunk_size, config.keep_graphs
    if keep is None:  # the digits show what a step takes without
        keep = "auto" if device.type == "cpu" and config.data != ("digits",) else 0
    if resumed:
        chunk_size = resumed["chunk_size"] if chunk_size == "auto" else chunk_size
        keep = resumed["keep_graphs"] if keep == "auto" else keep
    weights = sum(parameter.nbytes for parameter in towers.parameters())
    trained = sum(parameter.nbytes for parameter in towers.parameters() if parameter.requires_grad)
    moments = 0 if config.optimizer == "sgd" else 2
    state = backend.state_bytes(weights, trained, moments) + (weights if config.ema else 0)
    per_rank = config.effective_batch // world_size
    if device.type == "cpu":
        size, memory = _estimated_chunk(config, backend, towers, inputs, chunk_size, per_rank)
    else:
        torch.get_device_module(device).empty_cache()
        # Gradients and moments, and the embeddings with the loss's tiles, are allocated later.
        room = MARGIN * (free_memory(device) - (state - weights) - embeddings)
        size, memory = _measured_chunk(config, backend, towers, inputs, chunk_size, per_rank, room)
    plan = BatchPlan(
        effective_batch=config.effective_batch,
        world_size=world_size,
        chunk_size=size,
        keep_graphs=0,
        xbm_size=config.xbm_size,
        embed_dim=towers.embed_dim,
        image_bytes=image_bytes,
        graph_bytes=memory.graph,
        chunk_bytes=memory.peak,
        state_bytes=state,
        tile=tile,
    )
    if backend.shards_weights:
        keep = 0
    elif keep == "auto":
        spare = free_memory(device) if device.type != "cpu" else free_memory(device) // local_ranks()
        keep = min(gather_objects(graphs_that_fit(plan, spare + weights, device)))
    return replace(plan, keep_graphs=min(int(keep), plan.chunks))


def shares_texts(backend: Backend, towers: TwoTowers, inputs: Inputs) -> bool:
    """True where each distinct text of a step is encoded once: exact while the text tower draws no random numbers.

    Not where weights are sharded: ranks would differ in the number of text forwards, and must run the same ones.
    """
    if backend.shards_weights:
        return False
    texts = {name: tensor for name, tensor in inputs.items() if name in TEXT_INPUTS}
    with backend.autocast():
        return all(gather_objects(same_every_time(towers, texts)))


def _estimated_chunk(
    config: FittedConfig, backend: Backend, towers: TwoTowers, inputs: Inputs, asked: int | str, per_rank: int
) -> tuple[int, ChunkMemory]:
    """The chunk size on a CPU and the estimated memory of such a chunk."""
    with backend.autocast():
        a_pair = measure_activations(towers, inputs)
    size = asked if isinstance(asked, int) else largest_chunk(a_pair, per_rank)
    if config.compile:
        compile_trunks(towers, COMPILER, backend.accelerator.device)
    pairs = ceil(per_rank / ceil(per_rank / size))
    pixels = INPUT_COPIES * sum(tensor[0].nbytes for tensor in inputs.values())
    return size, ChunkMemory(pairs * a_pair, pairs * (a_pair + pixels))


def _measured_chunk(
    config: FittedConfig,
    backend: Backend,
    towers: TwoTowers,
    inputs: Inputs,
    asked: int | str,
    per_rank: int,
    room: float,
) -> tuple[int, ChunkMemory]:
    """The chunk size on an accelerator, the same on all ranks, and the measured memory of such a chunk."""
    device, most = backend.accelerator.device, min(per_rank, LARGEST_CHUNK)

    def measure(pairs: int) -> ChunkMemory:
        # Under an autocast of its own, as in training, where every graph has its own cast weights.
        with backend.autocast():
            return memory_of_chunk(towers, inputs, device, pairs)

    size = asked if isinstance(asked, int) else min(gather_objects(largest_that_fits(measure, most, room)))
    if config.compile:
        compile_trunks(towers, COMPILER, device)
        if not isinstance(asked, int):
            size = _compiled_chunk(measure, size, per_rank, most, room)
    pairs = ceil(per_rank / ceil(per_rank / size))
    with device_faults_reported(pairs):
        return size, measure(pairs)


def _compiled_chunk(measure: Callable[[int], ChunkMemory], size: int, per_rank: int, most: int, room: float) -> int:
    """Measure the compiled trunks once more: they take less memory than those that `size` was chosen for."""
    size = compiled_for = even_chunk(per_rank, size)
    peak = peak_or_none(measure, size)
    larger = 0 if peak is None else even_chunk(per_rank, largest_chunk_below(size * room / peak, most))
    if larger > size:
        torch.compiler.reset()  # otherwise torch takes the second size for a reason to compile for all sizes
        compiled_for, peak = larger, peak_or_none(measure, larger)
        size = size if peak is None or peak > room else larger
    agreed: int = min(gather_objects(size))
    if agreed != compiled_for:
        torch.compiler.reset()
    return agreed


def graphs_that_fit(plan: BatchPlan, free: int, device: torch.device) -> int:
    """Chunks for --keep-graphs auto: those that fit into the free memory besides the plan.

    On an accelerator all but a margin for fragmentation; on a CPU half, which other processes need as well, and the
    images of this and of the next step lie there too.
    """
    if device.type == "cpu":
        spare = (free - plan.device_bytes - 2 * plan.pixel_bytes) // 2
    else:
        spare = int(MARGIN * free) - plan.device_bytes
    return max(0, min(plan.chunks, spare // max(plan.graph_bytes, 1)))


def embedding_bytes(effective_batch: int, xbm_size: int, embed_dim: int, tile: int) -> int:
    """Fresh embeddings of both towers, their gradients and copies, the memory bank, and the loss's tiles, in float32.

    tile: rows and columns of the logits that the loss holds at a time.
    """
    rows = 9 * effective_batch + 2 * xbm_size
    return 4 * (rows * embed_dim + 3 * min(tile, effective_batch) ** 2)


def oversize_warning(effective_batch: int, xbm_size: int, pairs: int | None) -> str | None:
    """The warning about a batch larger than the data set, with what to use instead; None for other batches."""
    if pairs is None or effective_batch <= pairs:
        return None
    times = effective_batch / pairs
    repeats = f"the data set has {pairs:,} pairs, and {effective_batch} repeats each {times:.1f} times a step"
    smaller = max(1, effective_batch // 8)
    if smaller > MOST_REPEATS * pairs:
        of_data = 2 ** max(1, int(log2(max(pairs, 2) / 2)))
        return f"Use --effective-batch {of_data} --xbm-size 0: {repeats}; few pairs need many small steps"
    instead = f"--effective-batch {smaller} --xbm-size {max(xbm_size, effective_batch) - smaller}"
    return f"Use {instead}: {repeats}; this gives as many candidates and eight times the updates"


def useless_memory_warning(effective_batch: int, xbm_size: int, pairs: int | None) -> str | None:
    """The warning about a memory that holds only copies of a small data set; None where it is useful."""
    if pairs is None or effective_batch > pairs or xbm_size <= MOST_REPEATS * pairs:
        return None
    return (
        f"Use --xbm-size 0, or a larger --effective-batch: the data set has {pairs:,} pairs, and a memory of "
        f"{xbm_size} holds each {xbm_size / pairs:.1f} times"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def gigabytes(count: int) -> str:
    """`1.25 GiB`, or `12 MiB` below a tenth of that unit."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.0f} MiB"
