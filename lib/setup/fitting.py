"""Fit chunks and kept graphs into memory, which is measured on an accelerator and estimated on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.backends import Backend
from lib.backends.device import (
    device_faults_reported,
    fork_rng,
    free_memory,
    is_out_of_memory,
    total_memory,
)
from lib.config import TrainConfig
from lib.distributed import gather_objects, local_ranks
from lib.errors import InputError
from lib.gradcache.distinct_texts import TEXT_INPUTS, same_every_time
from lib.gradcache.prefetch import Inputs
from lib.gradcache.random_state import batch_norm_statistics, restore_statistics
from lib.losses.tiles import tile_side
from lib.runs.checkpoint import TrainingState
from lib.setup.plan import BatchPlan, embedding_bytes, gigabytes, largest_part
from lib.towers import TwoTowers
from lib.towers.trunk_options import compile_trunks

CPU_ACTIVATIONS = 256 * 2**20  # bytes; larger chunks are no faster on a CPU
LARGEST_CHUNK = 4096
INPUT_COPIES = 1 + 4  # of the bytes of the pixels: as they came, and normalized to float32
MARGIN = 0.85  # of the free memory: fragmentation, and kernels that want more room in other shapes


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes that one chunk takes beside weights and gradients."""

    graph: int
    """what autograd keeps of it"""
    peak: int
    """of its forward and backward, inputs included"""


@dataclass(frozen=True)
class Fitting:
    """The towers, not yet wrapped, and what a forward takes of a few pairs, on the device; all ranks ask alike."""

    config: TrainConfig
    backend: Backend
    towers: TwoTowers
    inputs: Inputs
    resume_from: Path | None

    def plan(self, image_bytes: int, state: TrainingState | None) -> BatchPlan:
        """The batch, with what is `auto` settled alike on all ranks; with --compile the trunks are compiled here.

        image_bytes: of one image as it comes from the data. InputError for a batch whose embeddings cannot fit.
        """
        config, device = self.config, self._device
        tile = tile_side(device)
        embeddings = embedding_bytes(config.effective_batch, config.xbm_size, self.towers.embed_dim, tile)
        if embeddings > total_memory(device):
            raise InputError(
                f"--effective-batch {config.effective_batch} and --xbm-size {config.xbm_size} take "
                f"{gigabytes(embeddings)} for embeddings alone, and {device.type} has "
                f"{gigabytes(total_memory(device))}; lower them"
            )
        chunk_size, keep = config.chunk_size, config.keep_graphs
        if state:  # what was measured then holds, so that dropout's masks and sums stay the same
            chunk_size = state.progress["chunk_size"] if chunk_size == "auto" else chunk_size
            keep = state.progress["keep_graphs"] if keep == "auto" else keep
        chunk_size, memory = self._chunk(chunk_size, embeddings)
        plan = BatchPlan(
            effective_batch=config.effective_batch,
            world_size=self._world_size,
            chunk_size=chunk_size,
            keep_graphs=0,
            xbm_size=config.xbm_size,
            embed_dim=self.towers.embed_dim,
            image_bytes=image_bytes,
            graph_bytes=memory.graph,
            chunk_bytes=memory.peak,
            state_bytes=self._state_bytes,
            tile=tile,
        )
        if self.backend.shards_weights:
            keep = 0
        elif isinstance(keep, str):  # auto
            spare = free_memory(device) if device.type != "cpu" else free_memory(device) // local_ranks()
            graphs: int = min(gather_objects(graphs_that_fit(plan, spare + self._weight_bytes, device)))
            keep = graphs
        return replace(plan, keep_graphs=min(keep, plan.chunks))

    def shares_texts(self) -> bool:
        """Whether to encode each distinct text of a step once: where that is exact.

        Not where weights are sharded: ranks would differ in the chunks that have texts, and must run the same forwards.
        """
        if self.backend.shards_weights or self.config.shared_texts == "off":
            return False
        texts = {name: tensor for name, tensor in self.inputs.items() if name in TEXT_INPUTS}
        with self.backend.autocast():
            return all(gather_objects(same_every_time(self.towers, texts)))

    def _chunk(self, asked: int | str, embeddings: int) -> tuple[int, ChunkMemory]:
        """The chunk size, the same on all ranks, and what such a chunk takes."""
        device, per_rank = self._device, self.config.effective_batch // self._world_size
        if device.type == "cpu":
            with self.backend.autocast():
                a_pair = measure_activations(self.towers, self.inputs)
            size = asked if isinstance(asked, int) else largest_chunk(a_pair, per_rank)
            if self.config.compile:
                compile_trunks(self.towers, self.config.compile_backend, device)
            pairs = largest_part(per_rank, size)
            pixels = INPUT_COPIES * sum(tensor[0].nbytes for tensor in self.inputs.values())
            return size, ChunkMemory(pairs * a_pair, pairs * (a_pair + pixels))
        torch.get_device_module(device).empty_cache()
        # To come beside the chunk: gradients and moments, and the embeddings with the loss's tiles.
        room = MARGIN * (free_memory(device) - (self._state_bytes - self._weight_bytes) - embeddings)
        if isinstance(asked, int):
            size = asked
        else:
            size = min(gather_objects(largest_that_fits(self._measured, min(per_rank, LARGEST_CHUNK), room)))
        if self.config.compile:
            size = self._compiled_chunk(size, room, fixed=isinstance(asked, int))
        pairs = largest_part(per_rank, size)
        with device_faults_reported(pairs):
            return size, self._measured(pairs)

    def _measured(self, pairs: int) -> ChunkMemory:
        """Measure a chunk under an autocast of its own, as in training, where every graph has cast weights."""
        with self.backend.autocast():
            return memory_of_chunk(self.towers, self.inputs, self._device, pairs)

    def _compiled_chunk(self, size: int, room: float, fixed: bool) -> int:
        """Compile the trunks and, unless the size is fixed, measure again: compiled trunks take less memory."""
        per_rank = self.config.effective_batch // self._world_size
        compile_trunks(self.towers, self.config.compile_backend, self._device)
        if fixed:
            return size
        most = min(per_rank, LARGEST_CHUNK)
        size = compiled_for = even_chunk(per_rank, size)
        peak = _peak_or_none(self._measured, size)
        larger = 0 if peak is None else even_chunk(per_rank, largest_chunk_below(size * room / peak, most))
        if larger > size:
            torch.compiler.reset()  # or torch would take the second size for a reason to compile for all sizes
            compiled_for, peak = larger, _peak_or_none(self._measured, larger)
            size = size if peak is None or peak > room else larger
        agreed: int = min(gather_objects(size))
        if agreed != compiled_for:
            torch.compiler.reset()
        return agreed

    @property
    def _device(self) -> torch.device:
        return self.backend.accelerator.device

    @property
    def _world_size(self) -> int:
        return self.backend.accelerator.num_processes

    @property
    def _weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.towers.parameters())

    @property
    def _state_bytes(self) -> int:
        """Weights, their average, gradients and moments, on one rank."""
        trained = sum(parameter.nbytes for parameter in self.towers.parameters() if parameter.requires_grad)
        moments = 0 if self.config.optimizer == "sgd" else 2
        average = self._weight_bytes if self.config.ema else 0
        return self.backend.state_bytes(self._weight_bytes, trained, moments) + average


def largest_that_fits(measure: Callable[[int], ChunkMemory], most: int, room: float) -> int:
    """The largest chunk size, at most `most`, whose peak was measured to be within `room` bytes; at least 1.

    measure: raises where a chunk of so many pairs does not fit. Sizes are a quarter of a power of two apart.
    """
    fits, peak, a_pair = 1, 0.0, 0.0
    size = 1
    while size <= most:
        measured = _peak_or_none(measure, size)
        if measured is None or measured > room:
            break
        # From a few pairs on memory grows with them.
        a_pair = (measured - peak) / (size - fits) if size > fits else 0.0
        fits, peak = size, measured
        if size >= 8 and peak + size * a_pair > room:
            break
        size *= 2
    for size in (fits * 7 // 4, fits * 6 // 4, fits * 5 // 4):
        if fits < size <= most and peak + (size - fits) * a_pair <= room:
            measured = _peak_or_none(measure, size)
            if measured is not None and measured <= room:
                return size
    return fits


def _peak_or_none(measure: Callable[[int], ChunkMemory], size: int) -> int | None:
    try:
        return measure(size).peak
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def largest_chunk(activation_bytes: int, per_rank: int) -> int:
    """C for --chunk-size auto on a CPU: the largest whose activations are not more than pays."""
    return largest_chunk_below(CPU_ACTIVATIONS / activation_bytes, min(per_rank, LARGEST_CHUNK))


def largest_chunk_below(pairs: float, most: int) -> int:
    """The largest size among the powers of two and the three quarters between them, at most `pairs` and `most`."""
    size = 1
    while 2 * size <= min(pairs, most):
        size *= 2
    return (
        max(quarter for quarter in (4, 5, 6, 7) if quarter == 4 or size * quarter // 4 <= min(pairs, most)) * size // 4
    )


def even_chunk(per_rank: int, largest: int) -> int:
    """A chunk size of which B is a multiple, so that all chunks are alike and a trunk is compiled for one size.

    More than half of `largest`; where there is none, `largest`.
    """
    divisors = (size for size in range(largest, largest // 2, -1) if per_rank % size == 0)
    return next(divisors, largest)


def graphs_that_fit(plan: BatchPlan, free: int, device: torch.device) -> int:
    """Chunks for --keep-graphs auto: what fits into the free memory that is left beside the plan.

    On a device of its own all but a margin for what the allocator loses between blocks; on a CPU half, which others
    need as well, and the images of this and of the next step lie there too.
    """
    if device.type == "cpu":
        spare = (free - plan.device_bytes - 2 * plan.pixel_bytes) // 2
    else:
        spare = int(MARGIN * free) - plan.device_bytes
    return max(0, min(plan.chunks, spare // max(plan.graph_bytes, 1)))


def memory_of_chunk(towers: nn.Module, inputs: Inputs, device: torch.device, pairs: int) -> ChunkMemory:
    """Measure the memory of a forward and a backward of so many pairs, besides weights and gradients.

    inputs: what the forward takes, by name, of a few pairs like the data's; they are repeated.
    """
    module = torch.get_device_module(device)
    trained = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    try:
        with _undisturbed(towers, device):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            module.synchronize(device)
            module.reset_peak_memory_stats(device)
            before = module.memory_allocated(device)
            output = towers(**repeated(inputs, pairs))
            graph = module.memory_allocated(device) - before
            embeds = [each for each in (output.image_embeds, output.text_embeds) if each is not None]
            total = sum((each.sum() for each in embeds), start=torch.zeros((), device=device))
            del output, embeds
            if total.requires_grad:
                total.backward()
            return ChunkMemory(graph, module.max_memory_allocated(device) - before)
    finally:
        module.empty_cache()


def measure_activations(towers: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that one pair takes in a forward of `towers` in training mode: what autograd saves, or, where a frozen
    trunk saves nothing, four times the largest output of a layer.

    inputs: what the forward takes, by name, of at least 4 pairs like the data's. Measured as the difference between 4
    and 2 pairs, so that what does not grow with the chunk drops out.
    """
    largest_output = 0

    def note_output(module: nn.Module, _: object, output: object) -> None:
        nonlocal largest_output
        if isinstance(output, Tensor) and output.ndim:
            largest_output = max(largest_output, output.nbytes // output.shape[0])

    hooks = [module.register_forward_hook(note_output) for module in towers.modules() if not list(module.children())]
    parameters = {parameter.untyped_storage()._cdata for parameter in towers.parameters()}  # tensors may have no data

    def saved_bytes(pairs: int) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                seen[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = towers(**{name: tensor[:pairs] for name, tensor in inputs.items()})
        del output
        return sum(seen.values())

    with _undisturbed(towers, next(iter(inputs.values())).device):
        difference = (saved_bytes(4) - saved_bytes(2)) // 2
    for hook in hooks:
        hook.remove()
    return max(difference, 4 * largest_output)


def repeated(inputs: Inputs, pairs: int) -> Inputs:
    """The same rows again and again, as many as asked for."""
    return {name: tensor[torch.arange(pairs, device=tensor.device) % len(tensor)] for name, tensor in inputs.items()}


@contextmanager
def _undisturbed(towers: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave no gradients, no moved batch-norm statistics and no drawn random numbers behind."""
    statistics = batch_norm_statistics(towers)
    try:
        with fork_rng(device):
            yield
    finally:
        restore_statistics(statistics)
        for parameter in towers.parameters():
            parameter.grad = None
