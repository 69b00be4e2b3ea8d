"""TrainConfig: every setting of a training run, and the checks of their values before anything is loaded."""

from dataclasses import dataclass

from lib.config.flags import (
    LARGEST_SEED,
    MOST_WORKERS,
    Batch,
    Data,
    Evaluation,
    FineTuning,
    Images,
    Loss,
    Model,
    MostUsed,
    Optimizer,
    Run,
    Settings,
    flag,
)

LARGEST_SIDE = 4096  # pixels; larger images need more memory than there is, so the number is a slip of the finger
_HEADS = ("projection", "projection_dim", "projection_hidden")


@dataclass(frozen=True)
class TrainConfig(Run, Evaluation, Optimizer, Loss, Batch, FineTuning, Model, Images, Data, MostUsed, Settings):
    """Settings of a run. 0 switches a feature off where a number says how much or how often."""

    def __post_init__(self) -> None:
        if self.freeze == ("none",):  # one value for one meaning, which checkpoints compare
            object.__setattr__(self, "freeze", ())

    def problems(self, world_size: int) -> list[str]:
        """Faults of these settings on this many ranks: one clause for each flag, with its remedy."""
        found = [
            *self.faults(),
            *self._faults_of_data(),
            *self._faults_of_model(),
            *self._faults_of_batch(world_size),
            *self._faults_of_optimization(),
            *self._faults_of_run(),
        ]
        first = {problem.split()[0]: problem for problem in reversed(found)}  # more about the same flag is noise
        return [problem for problem in found if first[problem.split()[0]] is problem]

    def _faults_of_data(self) -> list[str]:
        found = self.fractions("max_bad") + self.not_negative("workers", "shard_cache_gib")
        if self.workers != "auto" and self.workers > MOST_WORKERS:
            found.append(
                f"--workers {self.workers} must be at most {MOST_WORKERS}, on each rank; auto suits most machines"
            )
        found += self.at_least_one("image_size")
        if self.image_size is not None and self.image_size > LARGEST_SIDE:
            found.append(f"--image-size {self.image_size} must be at most {LARGEST_SIDE} pixels")
        return found

    def _faults_of_model(self) -> list[str]:
        found = self.at_least_one("projection_dim", "projection_hidden") + self.fractions("dropout", whole=False)
        if self.image_tower and self.given("model"):
            found.append(f"--model {self.model} and --image-tower {self.image_tower} exclude each other; give one")
        if not self.image_tower:
            found += [
                f"{flag(name)} {self.shown(name)} shapes heads of --image-tower and --text-tower; give them"
                for name in _HEADS
                if self.given(name)
            ]
        if not 1 <= len(self.projection) <= 2:
            found.append(f"--projection {self.shown('projection')} must be one kind, or the image's and the text's")
        if (self.image_tower is None) != (self.text_tower is None):
            found.append("--image-tower and --text-tower go together; give both, or use --model")
        found += [
            f"{flag(name)} '' is empty; name one"
            for name in ("model", "image_tower", "text_tower")
            if getattr(self, name) == ""
        ]
        found += self.not_negative("lora")
        for word in ("auto", "none"):
            if word in self.freeze and len(self.freeze) > 1:
                found.append(f"--freeze {self.shown('freeze')}: {word} stands alone; leave it or the others out")
        if self.unfreeze and self.freeze in ((), ("auto",)):
            found.append(f"--unfreeze {' '.join(self.unfreeze)} needs --freeze, to whose parts it makes exceptions")
        return found

    def _faults_of_batch(self, world_size: int) -> list[str]:
        found = self.at_least_one("effective_batch", "chunk_size")
        found += self.not_negative("keep_graphs", "xbm_size", "xbm_start")
        if self.effective_batch == 1 and self.xbm_size in (0, "auto"):
            found.append("--effective-batch 1 without memory has no negatives; use at least 2")
        if isinstance(self.effective_batch, int) and self.effective_batch >= 1 and self.effective_batch % world_size:
            nearest = max(1, round(self.effective_batch / world_size)) * world_size
            found.append(
                f"--effective-batch {self.effective_batch} is not divisible by {world_size} ranks; "
                f"the nearest that is: {nearest}"
            )
        found += self.fractions("label_smoothing", whole=False)
        found += self.above_zero("pos_weight") + self.not_negative("scale_max")
        if self.scale_schedule and min(self.scale_schedule) <= 0:
            found.append(f"--scale-schedule {self.shown('scale_schedule')} must be greater than 0")
        return found

    def _faults_of_optimization(self) -> list[str]:
        found = self.at_least_one("steps") + self.above_zero("epochs", "lr", "head_lr")
        found += self.not_negative("head_epochs")
        if self.trunk_lr and min(self.trunk_lr) <= 0:
            found.append(f"--trunk-lr {self.shown('trunk_lr')} must be greater than 0")
        found += self.not_negative("warmup_steps", "weight_decay", "grad_clip")
        found += self.fractions("beta2", "ema", whole=False)
        if self.layer_decay != "auto" and not 0 < self.layer_decay <= 1:
            found.append(f"--layer-decay {self.layer_decay} must be a fraction greater than 0, up to 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            found.append(f"--seed {self.seed} must be from 0 to {LARGEST_SEED}")
        return found

    def _faults_of_run(self) -> list[str]:
        found = self.not_negative("eval_every", "patience", "save_every", "keep_checkpoints")
        if self.patience and not self.eval_every:
            found.append(f"--patience {self.patience} counts evaluations; --eval-every 0 switches them off")
        if self.resume == "auto" and self.output_dir is None:
            found.append("--resume auto needs --output-dir, the folder of the run to resume")
        return found
