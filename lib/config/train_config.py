"""TrainConfig: every setting of a training run, of all groups, and the checks across groups."""

from dataclasses import dataclass

from lib.config.batch import Batch
from lib.config.data import Data
from lib.config.evaluation import Evaluation
from lib.config.fine_tuning import FineTuning
from lib.config.images import Images
from lib.config.loss import Loss
from lib.config.model import Model
from lib.config.optimizer import Optimizer
from lib.config.run import Run


@dataclass(frozen=True)
class TrainConfig(Run, Evaluation, Optimizer, Loss, Batch, FineTuning, Model, Images, Data):
    """Settings of a run. 0 switches a thing off where a number says how much or how often."""

    def problems(self, world_size: int) -> list[str]:
        """What is wrong with these settings on this many ranks, one clause for each flag, each with its remedy."""
        found = self.faults() + self.undivided(world_size) + self._contradictions()
        first = {problem.split()[0]: problem for problem in reversed(found)}  # more about the same flag is noise
        return [problem for problem in found if first[problem.split()[0]] is problem]

    def _contradictions(self) -> list[str]:
        found = []
        if self.cache_image and self.augment != "none":
            found.append(
                f"--cache-image and --augment {self.augment} exclude each other: it makes new images every time"
            )
        if self.eval_ema and not self.ema:
            found.append("--eval-ema needs --ema, such as --ema 0.999")
        return found
