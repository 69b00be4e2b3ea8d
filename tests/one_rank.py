"""A training on one rank, wrapped by DDP as many are: `torchrun --nproc_per_node 1 tests/one_rank.py FLAGS`."""

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train_clip
from lib.backends import Backend


def wrap(self: Backend, largest_norm: float) -> nn.Module:
    """As accelerate does it for several ranks; one alone would not be wrapped."""
    wrapped = DistributedDataParallel(self.towers, broadcast_buffers=False, gradient_as_bucket_view=True)
    self.no_sync = wrapped.no_sync
    return wrapped


def told(start):
    """The same start, which prints the collectives' backend."""

    def starting(*given):
        backend = start(*given)
        print("backend", dist.get_backend(), flush=True)
        return backend

    return starting


if __name__ == "__main__":
    from lib import backends

    backends.start = told(backends.start)
    Backend._wrap = wrap
    train_clip.main()
