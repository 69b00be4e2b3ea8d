"""Training on one rank with DDP's wrapper, as on several: `torchrun --nproc_per_node 1 tests/one_rank.py FLAGS`."""

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train_clip
from lib.backends import Backend


def wrap(self: Backend, largest_norm: float) -> nn.Module:
    """Wrap the model as Accelerate does for several ranks; it does not wrap a single one."""
    wrapped = DistributedDataParallel(self.towers, broadcast_buffers=False, gradient_as_bucket_view=True)
    self.no_sync = wrapped.no_sync
    return wrapped


def told(start):
    """Start in the same way and print the backend of the collectives."""

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
