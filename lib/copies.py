"""Moves the inputs of one forward after another to the device, a chunk ahead of what is computed."""

from collections.abc import Iterable, Iterator

import torch

from lib.shared_texts import Inputs


def on_device(chunks: Iterable[Inputs], device: torch.device) -> Iterator[Inputs]:
    """Each chunk's inputs on the device, in order.

    On a CUDA device the next chunk is copied while this one is computed (from pinned memory: a copy from other memory
    holds the host up), so two are there at a time.
    """
    if device.type != "cuda":
        yield from (_moved(inputs, device) for inputs in chunks)
        return
    copying = torch.cuda.Stream(device)
    waiting: tuple[Inputs, torch.cuda.Event] | None = None
    for inputs in chunks:
        with torch.cuda.stream(copying):
            moved, done = _moved(inputs, device), torch.cuda.Event()
            done.record(copying)
        if waiting:
            yield _ready(*waiting, device)
        waiting = moved, done
    if waiting:
        yield _ready(*waiting, device)


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def _ready(inputs: Inputs, done: "torch.cuda.Event", device: torch.device) -> Inputs:
    """Let the computing stream wait for the copy, and keep the memory until that stream is through with it."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(done)
    for tensor in inputs.values():
        tensor.record_stream(computing)
    return inputs
