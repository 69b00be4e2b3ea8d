"""A run's live objects, restored from a checkpoint and saved into one."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lib import checkpoint
from lib.averaging import WeightAverage
from lib.cached_step import RandomState, Recompute, StepResult
from lib.checkpoint import TrainingState
from lib.config import TrainConfig
from lib.data import EvaluationSet, Prepare, Source, TrainingData
from lib.errors import RunError
from lib.lora import merged_weights
from lib.optim import load_moments, moments_by_name, move_schedule
from lib.plan import BatchPlan
from lib.processing import Processing
from lib.towers import TwoTowers
from lib.xbm import CrossBatchMemory, MemorySwitch


@dataclass(frozen=True)
class Update:
    """One optimizer step: what the cached step found, the norm of the gradients, and the rate that was used."""

    result: StepResult
    grad_norm: float
    lr: float


@dataclass
class Run:
    """Everything that the loop works with; `towers` is the bare model, `wrapped` the one that all passes go through."""

    config: TrainConfig
    accelerator: Accelerator
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
    data: TrainingData
    memory: CrossBatchMemory
    switch: MemorySwitch
    steps: int
    workers: int
    pretrained: bool
    """The towers did not start from random weights."""
    share_texts: bool
    """Each distinct text of a step is encoded once."""
    together: int
    """Chunks that pass 1 embeds in one forward."""
    first_step: int = 0
    """Steps that were done before this process began."""
    best: dict = field(default_factory=dict)
    """{"step", "metric", "value"} of the best evaluation so far."""
    overflows: int = 0
    """fp16 updates skipped in a row."""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def evaluated(self) -> TwoTowers:
        """The towers that are measured, kept as the checkpoints' model and exported: the average's on request."""
        return self.average.module if self.average and self.config.eval_ema else self.towers

    @property
    def recompute(self) -> dict[str, Recompute]:
        """What of each tower pass 2 has to run again."""
        t = self.towers
        return {
            "image_recompute": _recompute(t.image_frozen, t.image_trunk_frozen),
            "text_recompute": _recompute(t.text_frozen, t.text_trunk_frozen),
        }

    def save(self, step: int) -> Path:
        """Write the checkpoint of a finished step, and prune old ones."""
        scaler = self.accelerator.scaler
        state = TrainingState(
            progress={
                "step": step,
                "world_size": self.plan.world_size,
                "workers": self.workers,
                "chunk_size": self.plan.chunk_size,
                "keep_graphs": self.plan.keep_graphs,
                "settings": settings_of_the_weights(self.config),
                "steps": self.steps,
                "best": self.best,
                "switch": self.switch.state_dict(),
            },
            optimizer={
                "moments": moments_by_name(self.optimizer, self.towers),
                "updates": self.schedule.last_epoch,
                "scaler": scaler.state_dict() if scaler else {},
            },
            rank={
                "random": asdict(RandomState.capture(self.accelerator.device)) | {"device": None},
                "data": self.data.state_dict(),
            },
            memory=self.memory.state_dict() if self.memory.size else {},
            weights=self.towers.state_dict() if self.config.lora or self.config.eval_ema else {},
            average=self.average.state_dict() if self.average else {},
        )
        try:
            folder = checkpoint.save_checkpoint(
                self.checkpoints,
                step,
                self.towers,
                merged_weights(self.evaluated),
                self.processing,
                state,
                rank=self.accelerator.process_index,
                barrier=self.accelerator.wait_for_everyone,
            )
        except OSError as error:
            standing = checkpoint.newest_whole(self.checkpoints)
            raise RunError(
                f"step {step}: the checkpoint cannot be written ({error}); the last whole one is {standing}. "
                "Make room or name another --output-dir, and go on with --resume",
                of_one_rank=True,
            ) from error
        if self.accelerator.is_main_process:
            if self.best.get("step") == step:
                checkpoint.mark_best(folder)
            checkpoint.prune(self.checkpoints, self.config.keep_checkpoints)
        return folder

    def restore(self, state: TrainingState) -> None:
        """Go on from a checkpoint's training state; the weights were loaded with the towers."""
        # Rates and decay are the command line's, which may have changed; the moments are the checkpoint's.
        load_moments(self.optimizer, self.towers, state.optimizer["moments"])
        move_schedule(self.schedule, state.optimizer["updates"])
        if self.average and state.average:
            self.average.load_state_dict(state.average)
        if self.accelerator.scaler and state.optimizer["scaler"]:
            self.accelerator.scaler.load_state_dict(state.optimizer["scaler"])
        self.data.load_state_dict(state.rank["data"], state.data_of_all_ranks)
        if self.memory.size and state.memory:
            self.memory.load_state_dict(state.memory)
        self.switch.load_state_dict(state.progress["switch"])
        self.first_step, self.best = state.progress["step"], state.progress["best"]
        if self.best:  # a kill may have come between the checkpoint and its mark, or the run has a new folder
            folder = self.checkpoints / f"step_{self.best['step']:06d}"
            if not checkpoint.is_whole(folder):
                self.best = {}
            elif self.accelerator.is_main_process:
                checkpoint.mark_best(folder)
        random = state.rank["random"]
        if random:
            RandomState(random["cpu"], random["accelerator"], self.accelerator.device).restore()


def settings_of_the_weights(config: TrainConfig) -> dict:
    """What a checkpoint's weights, moments, memory and step number mean nothing without, as JSON values."""
    names = (
        "model", "image_tower", "text_tower", "projection", "text_projection", "projection_dim", "projection_hidden",
        "projection_dropout", "image_size", "dropout", "freeze", "unfreeze", "lora",
        "lora_alpha", "lora_dropout", "optimizer", "effective_batch", "xbm_size", "captions", "seed",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _recompute(tower_frozen: bool, trunk_frozen: bool) -> Recompute:
    return "none" if tower_frozen else "head" if trunk_frozen else "all"
