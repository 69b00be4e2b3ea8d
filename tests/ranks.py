"""Run a function on several gloo ranks and return the value of rank 0."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One server imports what all ranks need and forks them from there: each would take seconds for it. DeepSpeed looks at
# any optimizer with its Muon's module, which takes three alone.
NEEDED = ["lib.train", "lib.backends.fsdp2", "deepspeed.runtime.zero.muon.muon_optimizer"]
mp.get_context("forkserver").set_forkserver_preload(NEEDED)


def on_ranks(world_size: int, function: Callable, *arguments):
    """Call function(*arguments) on every rank; rank 0's return value (what torch.save can hold) comes back."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        given = (world_size, _free_port(), dict(os.environ), function, arguments, result)
        mp.start_processes(_rank, given, nprocs=world_size, start_method="forkserver")
        return torch.load(result, weights_only=False)


def _rank(
    rank: int, world_size: int, port: int, environment: dict, function: Callable, arguments: tuple, result: Path
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)  # the server's is that of the first call
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))  # as torchrun sets them
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    value = function(*arguments)
    if rank == 0:
        torch.save(value, result)
    if dist.is_initialized():  # training ends the group itself
        dist.barrier()
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
