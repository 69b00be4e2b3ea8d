"""Trying the towers on a few pairs before the first step: the largest chunk that fits, and the seconds a step takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lib.first_pass import Recompute
from lib.losses import Loss, Pairs
from lib.replay import batch_norms_that_train
from lib.shared_texts import TEXT_INPUTS, Inputs

MARGIN = 0.85  # of the free memory: fragmentation, and kernels that want more room in other shapes
ENOUGH_SECONDS = 0.1  # a longer try is no better measure
ENOUGH_PAIRS, LONG_SECONDS = 16, 1.0  # with fewer pairs only a long try tells: a busy machine delays any by a little
TRIES = 3
ROWS = 1024  # of the loss's try


@dataclass(frozen=True)
class Costs:
    """Seconds of one pair in each tower: a forward without graph (pass 1), and what runs of it in pass 2."""

    image_pass_1: float
    image_pass_2: float
    text_pass_1: float
    text_pass_2: float

    def seconds(self, images: int, texts: float, kept: float) -> float:
        """Of so many images and texts of one rank; a part `kept` of the chunks has its graph from pass 1."""
        first = images * self.image_pass_1 + texts * self.text_pass_1
        return first * (1 - kept) + images * self.image_pass_2 + texts * self.text_pass_2


def largest_that_fits(peak_of: Callable[[int], int], most: int, room: int) -> int:
    """The largest power of two, at most `most`, that was tried and whose double would not fit; at least 1.

    peak_of: bytes that a chunk of so many pairs takes at its peak; raises torch.OutOfMemoryError where it does not fit.
    room: bytes that are free.
    """
    chunk, fits = 1, 1
    while chunk <= most:
        try:
            peak = peak_of(chunk)
        except torch.OutOfMemoryError:
            break
        if peak > MARGIN * room:
            break
        fits = chunk
        if 2 * peak > MARGIN * room and chunk >= 8:  # from a few pairs on memory grows with them
            break
        chunk *= 2
    return fits


def peak_of_chunk(towers: nn.Module, inputs: Inputs, device: torch.device, pairs: int) -> int:
    """Bytes that a forward and a backward of so many pairs take on the accelerator beside what is allocated.

    inputs: what the forward takes, by name, of a few pairs like the data's; they are repeated.
    """
    module = torch.get_device_module(device)
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    try:
        with _undisturbed(towers):
            _forward_backward(towers, repeated(inputs, pairs))
        return module.max_memory_allocated(device) - before
    finally:
        module.empty_cache()


def measure_costs(
    towers: nn.Module, inputs: Inputs, chunk_size: int, device: torch.device, image: Recompute, text: Recompute
) -> Costs:
    """Time each tower on repeated `inputs`, on more and more pairs until a try is long enough or a chunk is full."""
    of_text = {name: tensor for name, tensor in inputs.items() if name in TEXT_INPUTS}
    of_image = {name: tensor for name, tensor in inputs.items() if name not in TEXT_INPUTS}
    with _undisturbed(towers):
        costs = [
            _seconds_of_a_pair(run, part, chunk_size, device)
            for part, recompute in ((of_image, image), (of_text, text))
            for run in (_pass_1(towers), _pass_2(towers, recompute))
        ]
    return Costs(*costs)


def measure_loss(loss: Loss, embed_dim: int, rows: int, columns: int, device: torch.device) -> float:
    """Seconds of the loss with its gradients over rows x columns logits, from a smaller block; all ranks call it."""
    count = min(ROWS, columns)
    embeds = nn.functional.normalize(torch.ones(count, embed_dim, device=device).cumsum(0), dim=-1)
    numbers = torch.arange(count, device=device)
    pairs, one = Pairs(embeds, embeds, numbers, numbers), torch.ones((), device=device)
    block = slice(0, min(count, rows))
    seconds = _timed(lambda: loss(pairs, None, one, -one, block), device)
    return seconds * rows * columns / (block.stop * count)


def repeated(inputs: Inputs, pairs: int) -> Inputs:
    """The same rows again and again, as many as asked for."""
    return {name: tensor[torch.arange(pairs) % len(tensor)] for name, tensor in inputs.items()}


def _pass_1(towers: nn.Module) -> Callable[[Inputs], object]:
    return torch.no_grad()(lambda inputs: towers(**inputs))


def _pass_2(towers: nn.Module, recompute: Recompute) -> Callable[[Inputs], object] | None:
    if recompute == "all":
        return lambda inputs: _forward_backward(towers, inputs)
    return None  # nothing, or a head: next to nothing


def _forward_backward(towers: nn.Module, inputs: Inputs) -> None:
    output = towers(**inputs)
    embeds = [each for each in (output.image_embeds, output.text_embeds) if each is not None]
    total = sum(each.sum() for each in embeds)
    if total.requires_grad:
        total.backward()


def _seconds_of_a_pair(
    run: Callable[[Inputs], object] | None, inputs: Inputs, chunk_size: int, device: torch.device
) -> float:
    if run is None:
        return 0.0
    pairs = min(4, chunk_size)
    while True:
        batch = repeated(inputs, pairs)
        seconds = _timed(partial(run, batch), device)
        enough = seconds >= (ENOUGH_SECONDS if pairs >= ENOUGH_PAIRS else LONG_SECONDS)
        if enough or pairs == chunk_size:
            return seconds / pairs
        pairs = min(4 * pairs, chunk_size)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some runs: the first compiles kernels, and others may wait for a busy machine."""
    seconds = []
    for _ in range(TRIES):
        _wait_for(device)
        began = time.perf_counter()
        run()
        _wait_for(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@contextmanager
def _undisturbed(towers: nn.Module) -> Iterator[None]:
    """Leave no gradients, no moved batch-norm statistics and no drawn random numbers behind."""
    norms = batch_norms_that_train(towers)
    for norm in norms:
        norm.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for norm in norms:
            norm.train()
        for parameter in towers.parameters():
            parameter.grad = None


def spread(distinct: int | None, drawn: int) -> float:
    """How many different texts `drawn` pairs have, where there are `distinct` in all, evenly drawn; None: as many."""
    return float(drawn) if distinct is None else distinct * (1 - (1 - 1 / distinct) ** drawn)
