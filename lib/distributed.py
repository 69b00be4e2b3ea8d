"""Collective operations over all ranks; on one process each returns its argument unchanged."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lib.errors import InputError

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def local_ranks() -> int:
    """Processes of the job on this machine; all of them where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", rank_and_world_size()[1]))


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate every rank's rows in rank order: (B, ...) -> (W * B, ...); B must be the same on all ranks."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return rows
    gathered = rows.new_empty((world_size * rows.shape[0], *rows.shape[1:]))
    if dist.get_backend() == "nccl":  # one operation, where the list form copies every piece once more
        dist.all_gather_into_tensor(gathered, rows.contiguous())
    else:  # the form that every backend implements; the pieces are views of `gathered`
        dist.all_gather(list(gathered.chunk(world_size)), rows.contiguous())
    return gathered


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(values)
    return values


def sum_counts(counts: Sequence[int], device: torch.device) -> list[int]:
    """Sum whole numbers over the ranks; one rank waits for nothing."""
    if rank_and_world_size()[1] == 1:
        return list(counts)
    return sum_over_ranks(torch.tensor(counts, device=device)).tolist()


def gather_objects(value: T) -> list[T]:
    """Every rank's (picklable) value, in rank order, on every rank."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def decided_by_rank_0(decide: Callable[[], T]) -> T:
    """Call `decide` on rank 0 alone; return its result, or raise its InputError, on every rank."""
    decision: T | InputError | None = None
    if rank_and_world_size()[0] == 0:
        try:
            decision = decide()
        except InputError as fault:
            decision = fault
    decision = gather_objects(decision)[0]
    if isinstance(decision, InputError):
        raise decision
    return cast(T, decision)


def logsumexp_over_ranks(partial: Tensor) -> Tensor:
    """Merge every rank's partial log-sum-exp: (n,) -> (n,)."""
    return gather_rows(partial[None]).logsumexp(0)


@contextmanager
def meeting() -> Iterator[None]:
    """Within it ranks find each other; a place where they cannot meet raises InputError."""
    try:
        yield
    except dist.DistNetworkError as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        taken = "is in use by another job" if "EADDRINUSE" in str(error) else "cannot be reached"
        raise InputError(
            f"MASTER_PORT {port}: this port of {address} {taken}; name a free one that all ranks reach, by "
            "accelerate launch --main_process_port or torchrun --master-port"
        ) from error
