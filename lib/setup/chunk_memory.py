"""The memory of a chunk: measured on an accelerator, estimated on a CPU, and the largest chunk that fits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.backends.device import fork_rng, is_out_of_memory
from lib.gradcache.prefetch import Inputs
from lib.gradcache.random_state import batch_norm_statistics, restore_statistics

CPU_ACTIVATIONS = 256 * 2**20  # bytes; larger chunks are no faster on a CPU
LARGEST_CHUNK = 4096


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes that one chunk takes beside weights and gradients."""

    graph: int
    """kept by autograd"""
    peak: int
    """of its forward and backward, inputs included"""


def largest_that_fits(measure: Callable[[int], ChunkMemory], most: int, room: float) -> int:
    """The largest chunk size, at most `most`, whose peak was measured to be within `room` bytes; at least 1.

    measure: raises where a chunk of so many pairs does not fit. Sizes are a quarter of a power of two apart.
    """
    fits, peak, a_pair = 1, 0.0, 0.0
    size = 1
    while size <= most:
        measured = peak_or_none(measure, size)
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
            measured = peak_or_none(measure, size)
            if measured is not None and measured <= room:
                return size
    return fits


def peak_or_none(measure: Callable[[int], ChunkMemory], size: int) -> int | None:
    try:
        return measure(size).peak
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def largest_chunk(activation_bytes: int, per_rank: int) -> int:
    """C for --chunk-size auto on a CPU: the largest whose activations stay below CPU_ACTIVATIONS."""
    return largest_chunk_below(CPU_ACTIVATIONS / activation_bytes, min(per_rank, LARGEST_CHUNK))


def largest_chunk_below(pairs: float, most: int) -> int:
    """The largest size among powers of two and the three quarters between them, at most `pairs` and `most`."""
    most = max(1, int(min(pairs, most)))
    power = 2 ** (most.bit_length() - 1)
    return max(power * quarter // 4 for quarter in (4, 5, 6, 7) if power * quarter // 4 <= most)


def even_chunk(per_rank: int, largest: int) -> int:
    """A chunk size that divides B, so that all chunks have one size and a trunk is compiled for it alone.

    More than half of `largest`; where no such divisor exists, `largest`.
    """
    return next((size for size in range(largest, largest // 2, -1) if per_rank % size == 0), largest)


def memory_of_chunk(towers: nn.Module, inputs: Inputs, device: torch.device, pairs: int) -> ChunkMemory:
    """Measure the memory of a forward and a backward of so many pairs, besides weights and gradients.

    inputs: of a few pairs like the data's, by name; they are repeated.
    """
    module = torch.get_device_module(device)
    try:
        with _undisturbed(towers, device):
            for parameter in towers.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
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
    """Bytes that one pair takes in a forward of `towers` in training mode, as saved by autograd.

    Where a frozen trunk saves nothing: four times the largest output of a layer. inputs: of at least 4 pairs like the
    data's, by name. The difference between 4 and 2 pairs leaves out all that does not grow with the chunk.
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
    """The same rows repeated to so many pairs."""
    return {name: tensor[torch.arange(pairs, device=tensor.device) % len(tensor)] for name, tensor in inputs.items()}


@contextmanager
def _undisturbed(towers: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore gradients (none), batch-norm statistics and random state after a measurement."""
    statistics = batch_norm_statistics(towers)
    try:
        with fork_rng(device):
            yield
    finally:
        restore_statistics(statistics)
        for parameter in towers.parameters():
            parameter.grad = None
