"""A run's live objects, restored from a checkpoint and saved into one."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lib.backends import Backend
from lib.backends.optim import move_schedule
from lib.config import TrainConfig
from lib.data import EvaluationSet, Prepare, Source, TrainingData
from lib.files import json_without_secrets
from lib.gradcache.first_pass import Recompute, Recomputed
from lib.gradcache.inputs import Inputs
from lib.gradcache.random_state import RandomState, Statistics, batch_norm_statistics, restore_statistics
from lib.gradcache.step import StepResult
from lib.losses.positives import SameText
from lib.losses.xbm import CrossBatchMemory, MemorySwitch
from lib.runs import checkpoint
from lib.runs.checkpoint import TrainingState
from lib.setup.data import Loading, TextLengths
from lib.setup.plan import BatchPlan
from lib.towers import TwoTowers
from lib.towers.averaging import WeightAverage
from lib.towers.lora import merged_weights
from lib.towers.processing import Processing


@dataclass(frozen=True)
class Update:
    """One optimizer step: what the cached step found, the norm of the gradients, and the rate that was used."""

    result: StepResult
    loss: float
    grad_norm: float
    lr: float
    applied: bool = True
    """False where --on-nonfinite skip left the update out."""


@dataclass
class Run:
    """Everything that the loop works with; `towers` is the bare model, `wrapped` the one that all passes go through."""

    config: TrainConfig
    family: str
    """clip or siglip, after the loss"""
    backend: Backend
    folder: Path
    source: Source
    validation: EvaluationSet | None
    towers: TwoTowers
    processing: Processing
    prepare: Prepare
    wrapped: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    average: WeightAverage | None
    plan: BatchPlan
    loading: Loading
    data: TrainingData
    memory: CrossBatchMemory
    switch: MemorySwitch
    steps: int
    pretrained: bool
    """The towers did not start from random weights."""
    share_texts: bool
    """Each distinct text of a step is encoded once."""
    text_lengths: TextLengths | None
    """None on ranks other than 0, which do not count."""
    negatives: list[Inputs]
    """Texts that fit no image, in chunks, encoded at every step."""
    warnings: list[str]
    """About the checkpoints that were passed over."""
    first_step: int = 0
    """Steps that were done before this process began."""
    best: dict = field(default_factory=dict)
    """{"step", "metric", "value"} of the best evaluation so far."""
    stale: int = 0
    """Evaluations in a row that were not the best."""
    overflows: int = 0
    """fp16 updates skipped in a row."""
    nonfinite: int = 0
    """Updates left out in a row because loss or gradient were not finite."""

    @property
    def accelerator(self) -> Accelerator:
        return self.backend.accelerator

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best_checkpoint(self) -> Path | None:
        """The folder of the best step, if it is whole; None without evaluations."""
        folder = checkpoint.step_folders(self.checkpoints).get(self.best.get("step", -1))
        return folder if folder and checkpoint.is_whole(folder) else None

    @property
    def same_text(self) -> SameText:
        """How equal texts of different groups count. Prompts of one class are of one group: auto leaves them alone."""
        if self.config.same_text != "auto":
            return self.config.same_text
        return "negative" if self.source.templates else "exclude"

    @property
    def out_of_patience(self) -> bool:
        """Whether --patience ends the run here."""
        return bool(self.config.patience) and self.stale >= self.config.patience

    @property
    def evaluated(self) -> TwoTowers:
        """The towers that are measured, kept as the checkpoints' model and exported: the average's on request."""
        return self.average.module if self.average else self.towers

    def whole_towers(self) -> TwoTowers | None:
        """`evaluated` with all of its weights, on the main process at least; all ranks call it."""
        return self.evaluated if self.evaluated is not self.towers else self.backend.whole_towers()

    @property
    def recompute(self) -> Recomputed:
        """What of each tower pass 2 has to run again."""
        towers = self.towers
        return {
            "image_recompute": _recompute(towers.image_frozen, towers.image_trunk_frozen),
            "text_recompute": _recompute(towers.text_frozen, towers.text_trunk_frozen),
        }

    def save(self, step: int) -> Path:
        """Write the checkpoint of a finished step, and prune old ones."""
        backend = self.backend
        whole = backend.whole_towers()  # on all ranks, of which each may hold a part
        model = whole if self.evaluated is self.towers else self.evaluated
        state = TrainingState(
            progress={
                "step": step,
                "family": self.family,
                "world_size": self.plan.world_size,
                "workers": self.loading.workers,
                "part_size": self.loading.part_size,
                "chunk_size": self.plan.chunk_size,
                "keep_graphs": self.plan.keep_graphs,
                "settings": settings_of_the_weights(self.config),
                "steps": self.steps,
                "best": self.best,
                "stale": self.stale,
                "switch": self.switch.state_dict(),
            },
            optimizer={
                "moments": backend.moments(),
                "updates": self.schedule.last_epoch,
                "scaler": backend.loss_scale.state_dict() if backend.loss_scale else {},
            },
            rank={
                "random": asdict(RandomState.capture(self.accelerator.device)) | {"device": None},
                "data": self.data.state_dict(),
            },
            memory=self.memory.state_dict() if self.memory.size else {},
            weights=whole.state_dict() if whole is not None and (self.config.lora or self.average) else {},
            average=self.average.state_dict() if self.average else {},
        )
        folder = checkpoint.save_checkpoint(
            self.checkpoints,
            step,
            self.towers,
            {} if model is None else merged_weights(model),
            self.processing,
            state,
            rank=self.accelerator.process_index,
            barrier=self.accelerator.wait_for_everyone,
        )
        if self.accelerator.is_main_process:
            if self.best.get("step") == step:
                checkpoint.mark_best(folder)
            checkpoint.prune(self.checkpoints, self.config.keep_checkpoints, self.best.get("step"))
        return folder

    def restore(self, state: TrainingState) -> None:
        """Go on from a checkpoint's training state; the weights were loaded with the towers."""
        # Rates and decay are the command line's, which may have changed; the moments are the checkpoint's.
        self.backend.load_moments(state.optimizer["moments"])
        move_schedule(self.schedule, state.optimizer["updates"])
        if self.average and state.average:
            self.average.load_state_dict(state.average)
        if self.backend.loss_scale and state.optimizer["scaler"]:
            self.backend.loss_scale.load_state_dict(state.optimizer["scaler"])
        self.data.load_state_dict(state.rank["data"], state.data_of_all_ranks)
        if self.memory.size and state.memory:
            self.memory.load_state_dict(state.memory)
        self.switch.load_state_dict(state.progress["switch"])
        self.first_step, self.best = state.progress["step"], state.progress["best"]
        self.stale = state.progress.get("stale", 0)
        if self.best:  # a kill may have come between the checkpoint and its mark, or the run has a new folder
            if not self.best_checkpoint:
                self.best = {}
            elif self.accelerator.is_main_process:
                checkpoint.mark_best(self.best_checkpoint)
        random = state.rank["random"]
        if random:
            RandomState(random["cpu"], random["accelerator"], self.accelerator.device).restore()


def settings_of_the_weights(config: TrainConfig) -> dict:
    """What a checkpoint's weights, moments, memory and step number mean nothing without, as JSON values."""
    names = (
        "model", "image_tower", "text_tower", "projection", "projection_dim", "projection_hidden", "image_size",
        "dropout", "freeze", "unfreeze", "scale_schedule", "lora", "optimizer", "effective_batch", "xbm_size",
        "captions", "seed",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return json_without_secrets(listed)  # as checkpoint.json has them, to be compared with it


def _recompute(tower_frozen: bool, trunk_frozen: bool) -> Recompute:
    return "none" if tower_frozen else "head" if trunk_frozen else "all"


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
