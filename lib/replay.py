"""What makes a second pass over a chunk the same as the first: random state, and batch-norm statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.collectives import rank_and_world_size, sum_over_ranks


@dataclass(frozen=True, eq=False)
class RandomState:
    """The generators that dropout draws from: the CPU's and the accelerator's."""

    cpu: Tensor
    accelerator: Tensor | None
    device: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        module = None if device.type == "cpu" else torch.get_device_module(device)
        return cls(torch.get_rng_state(), module and module.get_rng_state(device), device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState):
            return NotImplemented
        on_device = self.accelerator is None or torch.equal(self.accelerator, other.accelerator)
        return torch.equal(self.cpu, other.cpu) and on_device

    __hash__ = None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


def batch_norms_that_train(towers: nn.Module) -> list[nn.Module]:
    """Batch norms in training mode: a pair's embedding depends on the others of its forward."""
    return [m for m in towers.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]


def batch_norm_statistics(towers: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Running statistics of batch norms in training mode, as pass 1 left them, averaged over ranks.

    Two passes must not update them twice, and ranks must agree on them.
    """
    buffers = [buffer for norm in batch_norms_that_train(towers) for buffer in norm.buffers(recurse=False)]
    world_size = rank_and_world_size()[1]
    saved = []
    for buffer in buffers:
        value = sum_over_ranks(buffer.detach().clone())
        saved.append((buffer, value / world_size if value.is_floating_point() else value // world_size))
    return saved


@torch.no_grad()
def restore_statistics(statistics: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in statistics:
        buffer.copy_(value)
