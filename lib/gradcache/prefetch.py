"""Copies the inputs of one forward after another to the device, while the forward before is computed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Inputs = dict[str, Tensor]
"""Inputs of one forward of the towers, by name."""

MOST_IN_FLIGHT = 2  # chunks whose inputs are on the device: one computed, one copied


def on_device(items: Iterable[T], inputs_of: Callable[[T], Inputs], device: torch.device) -> Iterator[tuple[T, Inputs]]:
    """Yield each item with its inputs on the device, in order.

    On a CUDA device an item is copied while the one before is computed, from page-locked memory: a copy from other
    memory blocks the host.
    """
    if device.type != "cuda":
        for item in items:
            yield item, {name: tensor.to(device) for name, tensor in inputs_of(item).items()}
        return
    copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
    computed: deque[torch.cuda.Event] = deque()
    for item in items:
        if len(computed) == MOST_IN_FLIGHT:
            # Compiled forwards are so few kernels that the host would run many chunks ahead, each with memory of its
            # own. Here it waits for the chunk before the one that is computed now: the GPU has work all the while.
            computed.popleft().synchronize()
        with torch.cuda.stream(copying):
            moved = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs_of(item).items()}
        computing.wait_stream(copying)
        for tensor in moved.values():
            tensor.record_stream(computing)  # or its memory would be given out again while it is still read
        yield item, moved
        del moved
        done = torch.cuda.Event(blocking=True)  # sleeps: a spinning host takes a core from the data workers
        done.record(computing)
        computed.append(done)


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the process: torch's allocator keeps memory apart for every stream that it was ever used on."""
    return torch.cuda.Stream(device)
