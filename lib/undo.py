"""What a step that comes to nothing is undone to: random states, the data's position, statistics of batch norms."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.replay import RandomState
from lib.run import Run


@dataclass(frozen=True)
class BeforeStep:
    """How a run stood before a step's data was asked for."""

    random: RandomState
    data: dict
    statistics: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, run: Run) -> "BeforeStep":
        """Remember what a step moves before its update."""
        return cls(
            RandomState.capture(run.accelerator.device), run.data.state_dict(), batch_norm_statistics(run.towers)
        )

    def restore_statistics(self) -> None:
        """Put the batch norms' running statistics back."""
        put_back(self.statistics)

    def restore(self, run: Run) -> None:
        """Let the run stand as if the step had not begun; its gradients are dropped."""
        run.optimizer.zero_grad()
        self.restore_statistics()
        run.data.load_state_dict(self.data)
        self.random.restore()


def batch_norm_statistics(towers: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Buffers of the batch norms that are in training mode, each with a copy."""
    return [
        (buffer, buffer.clone())
        for module in towers.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in module.buffers(recurse=False)
    ]


@torch.no_grad()
def put_back(statistics: list[tuple[Tensor, Tensor]]) -> None:
    """Give buffers the values that were copied."""
    for buffer, value in statistics:
        buffer.copy_(value)
