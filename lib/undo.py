"""What a step that comes to nothing is undone to: random states, the data's position, statistics of batch norms."""

from dataclasses import dataclass

from lib.replay import RandomState, Statistics, batch_norm_statistics, restore_statistics
from lib.run import Run


@dataclass(frozen=True)
class BeforeStep:
    """How a run stood before a step's data was asked for."""

    random: RandomState
    data: dict
    statistics: Statistics

    @classmethod
    def of(cls, run: Run) -> "BeforeStep":
        """Remember what a step moves before its update."""
        random = RandomState.capture(run.accelerator.device)
        return cls(random, run.data.state_dict(), batch_norm_statistics(run.towers))

    def restore_statistics(self) -> None:
        """Put the batch norms' running statistics back."""
        restore_statistics(self.statistics)

    def restore(self, run: Run) -> None:
        """Let the run stand as if the step had not begun; its gradients are dropped."""
        run.optimizer.zero_grad()
        self.restore_statistics()
        run.data.load_state_dict(self.data)
        self.random.restore()
