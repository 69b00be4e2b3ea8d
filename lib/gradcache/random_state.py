"""The state that makes a second pass over a chunk the same as the first: random state, and batch-norm statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.distributed import rank_and_world_size, sum_over_ranks


@dataclass(frozen=True, eq=False)
class RandomState:
    """The generators that dropout draws from: the CPU's and the accelerator's."""

    cpu: Tensor
    accelerator: Tensor | None
    device: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), on_device, device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState):
            return NotImplemented
        ours, theirs = self.accelerator, other.accelerator
        on_device = torch.equal(ours, theirs) if ours is not None and theirs is not None else ours is theirs
        return torch.equal(self.cpu, other.cpu) and on_device

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


def batch_norms_that_train(towers: nn.Module) -> list[nn.Module]:
    """Batch norms in training mode: a pair's embedding depends on the others of its forward."""
    return [m for m in towers.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]


Statistics = list[tuple[Tensor, Tensor]]
"""Running statistics: buffers of batch norms, each with a value for it."""


def batch_norm_statistics(towers: nn.Module) -> Statistics:
    """Running statistics of the batch norms in training mode, each with a copy."""
    buffers = [buffer for norm in batch_norms_that_train(towers) for buffer in norm.buffers(recurse=False)]
    return [(buffer, buffer.detach().clone()) for buffer in buffers]


def mean_over_ranks(statistics: Statistics) -> Statistics:
    """The same buffers with the mean of all ranks' values: ranks must agree on them."""
    world_size = rank_and_world_size()[1]
    means = []
    for buffer, value in statistics:
        total = sum_over_ranks(value)
        means.append((buffer, total / world_size if total.is_floating_point() else total // world_size))
    return means


@torch.no_grad()
def restore_statistics(statistics: Statistics) -> None:
    """Give the buffers the values that stand beside them."""
    for buffer, value in statistics:
        buffer.copy_(value)
