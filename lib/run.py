"""A run's live objects: made from the settings, restored from a checkpoint, and saved into one."""

import shutil
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lib import backend, checkpoint
from lib.cached_step import RandomState, Recompute
from lib.checkpoint import TrainingState
from lib.collectives import gather_objects
from lib.config import TrainConfig, flag
from lib.data import EvaluationSet, ImagePipeline, Source, TrainingData, open_sources
from lib.errors import InputError, RunError
from lib.optim import build_optimizer, build_schedule
from lib.plan import BatchPlan, graphs_that_fit, largest_chunk, measure_activations, state_bytes
from lib.processing import Processing
from lib.report import METRICS
from lib.towers import PRESETS, TwoTowers, load_towers
from lib.towers.presets import SIZES
from lib.xbm import CrossBatchMemory, MemorySwitch


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
    wrapped: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    plan: BatchPlan
    data: TrainingData
    memory: CrossBatchMemory
    switch: MemorySwitch
    steps: int
    workers: int
    pretrained: bool
    """The towers did not start from random weights."""
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
                "settings": _settings_of_the_weights(self.config),
                "steps": self.steps,
                "best": self.best,
                "switch": self.switch.state_dict(),
            },
            optimizer={
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
            },
            rank={
                "random": asdict(RandomState.capture(self.accelerator.device)) | {"device": None},
                "data": self.data.state_dict(),
            },
            memory=self.memory.state_dict() if self.memory.size else {},
        )
        try:
            folder = checkpoint.save_checkpoint(
                self.checkpoints,
                step,
                self.towers,
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
        # Learning rate and decay are the command line's, which may have changed; the moments are the checkpoint's.
        asked = [
            {name: g[name] for name in ("weight_decay", "betas") if name in g} for g in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state.optimizer["optimizer"])
        self.schedule.load_state_dict(state.optimizer["schedule"])
        self.schedule.base_lrs = [self.config.lr] * len(asked)
        factors = [factor(self.schedule.last_epoch) for factor in self.schedule.lr_lambdas]
        for group, settings, factor in zip(self.optimizer.param_groups, asked, factors, strict=True):
            group.update(settings, initial_lr=self.config.lr, lr=self.config.lr * factor)
        if self.accelerator.scaler and state.optimizer["scaler"]:
            self.accelerator.scaler.load_state_dict(state.optimizer["scaler"])
        self.data.load_state_dict(state.rank["data"])
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


def make_run(config: TrainConfig, family: str) -> Run:
    """Build everything that the settings ask for, or raise InputError before the first batch."""
    accelerator = backend.start(config.tracker)
    folder = _claim_folder(config, family, accelerator)
    resume_from = checkpoint.find_resume(config.resume, folder / "checkpoints")
    state = _load_state(resume_from, accelerator)
    if state:
        _check_same_run(config, state.progress["settings"])
    source, validation = open_sources(config.data, config.val_data, config.prompts, config.captions)
    torch.manual_seed(config.seed)
    towers, processing, pretrained = _towers(config, family, source, resume_from)
    if not any(parameter.requires_grad for parameter in towers.parameters()):
        raise InputError(f"--freeze {' '.join(config.freeze)} leaves nothing to train")
    towers.to(accelerator.device).train()
    torch.manual_seed(config.seed + 1 + accelerator.process_index)  # ranks draw their own dropout masks

    plan = _plan(config, towers, processing, source, state, accelerator)
    workers = _workers(config, state, plan)
    steps = config.steps or _steps_of_epochs(config, source)
    warmup = steps // 10 if config.warmup_steps == "auto" else config.warmup_steps
    optimizer = build_optimizer(
        towers, config.optimizer, lr=config.lr, weight_decay=config.weight_decay, beta2=config.beta2
    )
    schedule = build_schedule(optimizer, config.schedule, warmup, steps)
    wrapped, prepared_optimizer = accelerator.prepare(towers, optimizer)
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        source=source,
        validation=validation,
        towers=towers,
        processing=processing,
        wrapped=wrapped,
        optimizer=prepared_optimizer,
        schedule=schedule,  # not prepared: Accelerate would step it once per process
        plan=plan,
        data=TrainingData(
            source,
            ImagePipeline(processing.image_size, processing.resize, config.augment),
            processing.tokenize,
            effective_batch=config.effective_batch,
            chunk_size=plan.chunk_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            workers=workers,
            seed=config.seed,
            pin_memory=accelerator.device.type == "cuda",
        ),
        memory=CrossBatchMemory(config.xbm_size, towers.embed_dim, accelerator.device),
        switch=MemorySwitch(config.xbm_start, warmup),
        steps=steps,
        workers=workers,
        pretrained=pretrained,
    )
    if state:
        run.restore(state)
    return run


def _claim_folder(config: TrainConfig, family: str, accelerator: Accelerator) -> Path:
    """The run's folder, chosen by rank 0 for all; refuses to write over another run."""
    choice = _choose_folder(config, family) if accelerator.is_main_process else None
    choice = gather_objects(choice)[0]
    if isinstance(choice, InputError):
        raise choice
    return choice


def _choose_folder(config: TrainConfig, family: str) -> Path | InputError:
    folder = config.output_dir
    if folder is None:
        names = [Path("runs") / (family if number == 1 else f"{family}-{number}") for number in range(1, 10_000)]
        folder = next(name for name in names if not name.exists())
    elif config.resume != "auto" and (folder / METRICS).exists():
        return InputError(
            f"--output-dir {folder} already holds a run; go on with it by --resume auto, or name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        return InputError(f"--output-dir {folder} cannot be written ({error.strerror}); name another folder")
    return folder


def _load_state(folder: Path | None, accelerator: Accelerator) -> TrainingState | None:
    if folder is None:
        return None
    return checkpoint.load_state(folder, accelerator.process_index, accelerator.num_processes)


def _settings_of_the_weights(config: TrainConfig) -> dict:
    """What a checkpoint's weights, moments, memory and step number mean nothing without, as JSON values."""
    names = (
        "model", "image_tower", "text_tower", "projection", "projection_dim", "projection_hidden", "projection_dropout",
        "image_size", "dropout", "freeze", "optimizer", "effective_batch", "xbm_size", "captions", "seed",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_same_run(config: TrainConfig, saved: dict) -> None:
    for name, value in _settings_of_the_weights(config).items():
        if saved[name] != value:
            raise InputError(
                f"{flag(name)} {value} is not that of the checkpoint ({saved[name]}); resume with the same, or start "
                "anew from its weights with --model CHECKPOINT_FOLDER"
            )


def _towers(
    config: TrainConfig, family: str, source: Source, resume_from: Path | None
) -> tuple[TwoTowers, Processing, bool]:
    if resume_from:
        towers, processing = TwoTowers.from_pretrained(resume_from), Processing.from_pretrained(resume_from)
    else:
        towers, processing = load_towers(
            family=family,
            model=None if config.image_tower else config.model,
            image_tower=config.image_tower,
            text_tower=config.text_tower,
            projection=config.projection,
            projection_dim=config.projection_dim,
            projection_hidden=config.projection_hidden,
            projection_dropout=config.projection_dropout,
            image_size=config.image_size,
            texts=source.sample_texts,
            use_bias=family == "siglip",
            dropout=config.dropout,
            seed=config.seed,
        )
    if config.resize != "auto":
        processing = replace(processing, resize=config.resize)
    towers.freeze(config.freeze)
    pretrained = config.image_tower is None and config.model not in (*PRESETS, *SIZES)
    return towers, processing, pretrained


def _workers(config: TrainConfig, state: TrainingState | None, plan: BatchPlan) -> int:
    if config.workers != "auto":
        return config.workers
    if state:  # a stream of shards goes on exactly only at the same number
        return state.progress["workers"]
    if config.data == "digits":
        return 0
    workers = min(4, max(1, backend.usable_cores() // plan.world_size))
    if Path("/dev/shm").is_dir():  # chunks travel through it; a container may have little
        chunk_bytes = plan.chunk_size * 3 * plan.image_size**2
        workers = min(workers, shutil.disk_usage("/dev/shm").free // (2 * plan.world_size * chunk_bytes))
    return min(gather_objects(workers))


def _plan(
    config: TrainConfig,
    towers: TwoTowers,
    processing: Processing,
    source: Source,
    state: TrainingState | None,
    accelerator: Accelerator,
) -> BatchPlan:
    """Measure the towers on texts of the data, and settle what is `auto`, alike on all ranks."""
    device, world_size = accelerator.device, accelerator.num_processes
    texts = (source.sample_texts(64) or ["a text"]) * 4
    input_ids, attention_mask = (tokens.to(device) for tokens in processing.tokenize(texts))
    with accelerator.autocast():
        activations = measure_activations(towers, input_ids, attention_mask, processing.image_size)
    per_rank = config.effective_batch // world_size
    chunk_size, keep = config.chunk_size, config.keep_graphs
    if state:  # what was measured then holds, so that dropout's masks and sums stay the same
        chunk_size = state.progress["chunk_size"] if chunk_size == "auto" else chunk_size
        keep = state.progress["keep_graphs"] if keep == "auto" else keep
    if chunk_size == "auto":
        chunk_size = min(gather_objects(largest_chunk(activations, per_rank, device)))
    plan = BatchPlan(
        effective_batch=config.effective_batch,
        world_size=world_size,
        chunk_size=chunk_size,
        keep_graphs=0,
        xbm_size=config.xbm_size,
        embed_dim=towers.embed_dim,
        image_size=processing.image_size,
        activation_bytes=activations,
        state_bytes=state_bytes(list(towers.parameters()), moments=2 if config.optimizer == "adamw" else 0),
    )
    if keep == "auto":
        keep = min(gather_objects(graphs_that_fit(plan, device, world_size)))
    return replace(plan, keep_graphs=min(keep, plan.chunks))


def _steps_of_epochs(config: TrainConfig, source: Source) -> int:
    if source.size is None:
        raise InputError(f"--epochs {config.epochs}: the size of {config.data} is not known; give --steps instead")
    return max(1, ceil(config.epochs * source.size / config.effective_batch))


def _recompute(tower_frozen: bool, trunk_frozen: bool) -> Recompute:
    return "none" if tower_frozen else "head" if trunk_frozen else "all"
