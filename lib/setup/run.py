"""A run's live objects by owner (model, data, step, progress), saved into checkpoints and restored from them."""

from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lib.backends import Backend
from lib.backends.optim import WeightAverage, move_schedule, scheduled_scale
from lib.config import FITTED, FittedConfig, TrainConfig
from lib.data import EvaluationSet, Prepare, Source, TrainingData
from lib.files import json_without_secrets
from lib.gradcache.random_state import RandomState, Statistics, batch_norm_statistics, restore_statistics
from lib.gradcache.step import GradCache, StepResult
from lib.losses.positives import SameText
from lib.losses.xbm import CrossBatchMemory, MemorySwitch
from lib.runs import checkpoint
from lib.runs.blend import INITIAL, save_initial
from lib.runs.checkpoint import TrainingState
from lib.runs.progress import Progress
from lib.setup.data import Loading, TextLengths
from lib.setup.model import is_preset
from lib.setup.plan import BatchPlan
from lib.towers import TwoTowers
from lib.towers.lora import merged_weights
from lib.towers.processing import Processing


@dataclass(frozen=True)
class Model:
    """The towers and everything that changes their weights."""

    towers: TwoTowers
    """bare; forwards that train go through GradCache.towers"""
    processing: Processing
    pretrained: bool
    """The towers did not start from random weights."""
    optimizer: Optimizer
    schedule: LambdaLR
    average: WeightAverage | None
    evaluated: TwoTowers
    """Towers that are evaluated, saved as the checkpoint's model and exported: the average's with --eval-ema."""


@dataclass(frozen=True)
class Data:
    """Training and validation data."""

    source: Source
    validation: EvaluationSet | None
    prepare: Prepare
    loading: Loading
    training: TrainingData
    """chunks of each step"""
    text_lengths: TextLengths | None
    """None on ranks other than 0, which do not count."""


@dataclass(frozen=True)
class Step:
    """The gradient-cached step, its numbers, and the memory bank."""

    cache: GradCache
    plan: BatchPlan
    memory: CrossBatchMemory
    switch: MemorySwitch


@dataclass(frozen=True)
class Run:
    """Everything that the training loop works with."""

    config: FittedConfig
    family: str
    """clip or siglip, after the loss"""
    backend: Backend
    folder: Path
    model: Model
    data: Data
    step: Step
    progress: Progress
    choices: list[str]
    """settings that were chosen for this data, each with its reason"""
    warnings: list[str]
    """about damaged checkpoints that were passed over"""

    @property
    def accelerator(self) -> Accelerator:
        return self.backend.accelerator

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best_checkpoint(self) -> Path | None:
        """The folder of the best step, if it is whole; None without evaluations."""
        folder = checkpoint.step_folders(self.checkpoints).get(self.progress.best.get("step", -1))
        return folder if folder and checkpoint.is_whole(folder) else None

    @property
    def same_text(self) -> SameText:
        """How equal texts of different groups count."""
        return same_text(self.config, self.data.source)

    def set_scheduled_scale(self, step: int) -> None:
        """Set the scale of this step where --scale-schedule replaces learning it."""
        if self.config.scale_schedule:
            with self.backend.editing(self.model.towers.logit_scale):
                scale = scheduled_scale(self.config.scale_schedule, step, self.progress.steps)
                self.model.towers.set_scale_and_bias(scale, None)

    def whole_towers(self) -> TwoTowers | None:
        """`model.evaluated` with all of its weights, on the main process at least; all ranks call it."""
        model = self.model
        return model.evaluated if model.evaluated is not model.towers else self.backend.whole_towers()

    def save_initial(self) -> None:
        """Store the weights as they are for later blends, unless they are a preset's random ones; all ranks call it."""
        config = self.config
        if is_preset(config):
            (self.folder / INITIAL).unlink(missing_ok=True)  # of another run, which ended before its first step
            return
        whole = self.backend.whole_towers()
        if whole is not None and self.accelerator.is_main_process:
            source = f"{config.image_tower} and {config.text_tower}" if config.image_tower else config.model
            save_initial(self.folder, merged_weights(whole), source)

    def save(self, step: int) -> Path:
        """Write the checkpoint of a finished step, and prune old ones."""
        backend, model, batch, progress = self.backend, self.model, self.step, self.progress
        whole = backend.whole_towers()  # all ranks call it: each may hold a part of the weights
        exported = whole if model.evaluated is model.towers else model.evaluated
        state = TrainingState(
            progress={
                "step": step,
                "family": self.family,
                "world_size": batch.plan.world_size,
                "workers": self.data.loading.workers,
                "part_size": self.data.loading.part_size,
                "chunk_size": batch.plan.chunk_size,
                "keep_graphs": batch.plan.keep_graphs,
                "settings": settings_of_the_weights(self.config),
                "fitted": {name: getattr(self.config, name) for name in FITTED},
                "steps": progress.steps,
                "best": progress.best,
                "stale": progress.stale,
                "switch": batch.switch.state_dict(),
            },
            optimizer={
                "moments": backend.moments(),
                "updates": model.schedule.last_epoch,
                "scaler": backend.loss_scale.state_dict() if backend.loss_scale else {},
            },
            rank={
                "random": asdict(RandomState.capture(self.accelerator.device)) | {"device": None},
                "data": self.data.training.state_dict(),
            },
            memory=batch.memory.state_dict() if batch.memory.size else {},
            weights=whole.state_dict() if whole is not None and (self.config.lora or model.average) else {},
            average=model.average.state_dict() if model.average else {},
        )
        folder = checkpoint.save_checkpoint(
            self.checkpoints,
            step,
            model.towers,
            {} if exported is None else merged_weights(exported),
            model.processing,
            state,
            rank=self.accelerator.process_index,
            barrier=self.accelerator.wait_for_everyone,
        )
        if self.accelerator.is_main_process:
            if progress.best.get("step") == step:
                checkpoint.mark_best(folder)
            checkpoint.prune(self.checkpoints, self.config.keep_checkpoints, progress.best.get("step"))
        return folder

    def save_unless_saved(self, step: int) -> None:
        """Save after an abandoned step, unless nothing was learned or the newest checkpoint is that of `step`."""
        newest = checkpoint.newest_whole(self.checkpoints)
        if step > self.progress.first_step and (newest is None or int(newest.name.removeprefix("step_")) != step):
            self.save(step)

    def restore(self, state: TrainingState) -> None:
        """Resume from a checkpoint's training state; the weights were loaded with the towers."""
        backend, model, batch, progress = self.backend, self.model, self.step, self.progress
        # Rates and decay are the command line's, which may have changed; the moments are the checkpoint's.
        backend.load_moments(state.optimizer["moments"])
        move_schedule(model.schedule, state.optimizer["updates"])
        if model.average and state.average:
            model.average.load_state_dict(state.average)
        if backend.loss_scale and state.optimizer["scaler"]:
            backend.loss_scale.load_state_dict(state.optimizer["scaler"])
        self.data.training.load_state_dict(state.rank["data"], state.data_of_all_ranks)
        if batch.memory.size and state.memory:
            batch.memory.load_state_dict(state.memory)
        batch.switch.load_state_dict(state.progress["switch"])
        progress.first_step, progress.best = state.progress["step"], state.progress["best"]
        if self.data.validation and not self.data.validation.chooses:
            progress.best = {}  # of an earlier version, in which a test split chose it
        progress.stale = state.progress.get("stale", 0)
        if progress.best:  # a kill may have come between the checkpoint and its mark, or the run has a new folder
            if not self.best_checkpoint:
                progress.best = {}
            elif self.accelerator.is_main_process:
                checkpoint.mark_best(self.best_checkpoint)
        # Last, as building the rest may have drawn from the generators; None at another number of ranks.
        if random := state.rank["random"]:
            RandomState(random["cpu"], random["accelerator"], self.accelerator.device).restore()


def same_text(config: TrainConfig, source: Source) -> SameText:
    """How equal texts of different groups count; auto leaves class prompts alone, which are of one group."""
    if config.same_text != "auto":
        return config.same_text
    return "negative" if source.templates else "exclude"


def settings_of_the_weights(config: TrainConfig) -> dict:
    """Settings without which a checkpoint's weights, moments, memory and step number mean nothing, as JSON values."""
    names = (
        "model", "image_tower", "text_tower", "projection", "projection_dim", "projection_hidden", "image_size",
        "dropout", "freeze", "unfreeze", "scale_schedule", "lora", "optimizer", "effective_batch", "xbm_size",
        "captions", "seed",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return json_without_secrets(listed)  # as checkpoint.json has them, to be compared with it


@dataclass(frozen=True)
class BeforeStep:
    """State to restore when a step is abandoned: everything that a step changes before its update."""

    random: RandomState
    data: dict
    statistics: Statistics

    @classmethod
    def of(cls, run: Run) -> "BeforeStep":
        """Capture it before the step's data is read."""
        random = RandomState.capture(run.accelerator.device)
        return cls(random, run.data.training.state_dict(), batch_norm_statistics(run.model.towers))

    def restore_statistics(self) -> None:
        """Put the batch norms' running statistics back."""
        restore_statistics(self.statistics)

    def restore(self, run: Run) -> None:
        """Make the run as if the step had not begun; its gradients are dropped."""
        run.model.optimizer.zero_grad()
        self.restore_statistics()
        run.data.training.load_state_dict(self.data)
        self.random.restore()


@dataclass(frozen=True)
class Update:
    """Result of one optimizer step."""

    result: StepResult
    loss: float
    grad_norm: float
    """before clipping"""
    lr: float
    applied: bool = True
    """False where --on-nonfinite skip left the update out."""
