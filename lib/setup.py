"""From settings to a run: data, towers, plan, optimizer and memory, or one clear error before the first batch."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from lib import checkpoint
from lib.averaging import WeightAverage
from lib.backends import Backend
from lib.checkpoint import TrainingState
from lib.collectives import gather_objects
from lib.config import TrainConfig, flag
from lib.data import Prepare, TrainingData
from lib.data_setup import (
    make_fetcher,
    make_prepare,
    most_workers,
    negative_texts,
    open_data,
    sample_inputs,
    steps_of_epochs,
)
from lib.errors import InputError
from lib.model_setup import make_optimizer, make_towers
from lib.optim import build_schedule
from lib.plan import BatchPlan
from lib.run import Run, settings_of_the_weights
from lib.towers import Family
from lib.trial import Trial
from lib.trunk_options import compile_trunks
from lib.xbm import CrossBatchMemory, MemorySwitch


def make_run(config: TrainConfig, family: Family, backend: Backend, folder: Path) -> Run:
    """Build everything that the settings ask for in the run's folder, or raise InputError before the first batch."""
    accelerator = backend.accelerator
    _check_backend(config, backend)
    resume_from = checkpoint.find_resume(config.resume, folder / "checkpoints")
    state = _load_state(resume_from, accelerator)
    if state:
        _check_same_run(config, family, state.progress)
    fetcher = make_fetcher(config)
    source, validation = open_data(config, fetcher)
    torch.manual_seed(config.seed)
    towers, processing, pretrained = make_towers(config, family, source, resume_from, state)
    towers.to(accelerator.device).train()
    torch.manual_seed(config.seed + 1 + accelerator.process_index)  # ranks draw their own dropout masks

    negatives = negative_texts(config, source)
    prepare = make_prepare(config, towers, processing, source, negatives, fetcher.cache, accelerator.device)
    trial = Trial(config, backend, towers, sample_inputs(source, prepare, accelerator.device))
    plan = trial.plan(prepare.image_bytes, state)
    costs = trial.costs(plan)  # before the backend deals the weights out
    workers = _workers(config, state, plan, prepare)
    steps = config.steps or steps_of_epochs(config, source)
    warmup = steps // 10 if config.warmup_steps == "auto" else config.warmup_steps
    if warmup > steps:
        raise InputError(f"--warmup-steps {warmup} are more than the run's {steps} steps; lower them, or add --steps")
    optimizer = make_optimizer(config, towers, fused=backend.loss_scale is None)
    average = WeightAverage(towers, config.ema) if config.ema else None
    wrapped = backend.prepare(towers, optimizer, config.grad_clip)
    schedule = build_schedule(optimizer, config.schedule, warmup, steps)  # after: it knows the final groups
    run = Run(
        config=config,
        family=family,
        backend=backend,
        folder=folder,
        source=source,
        validation=validation,
        towers=towers,
        processing=processing,
        prepare=prepare,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        plan=plan,
        costs=costs,
        data=TrainingData(
            source,
            prepare,
            effective_batch=config.effective_batch,
            chunk_size=plan.chunk_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            workers=workers,
            seed=config.seed,
            shuffle_buffer=config.shuffle_buffer,
            pin_memory=accelerator.device.type == "cuda",
        ),
        memory=CrossBatchMemory(config.xbm_size, towers.embed_dim, accelerator.device),
        switch=MemorySwitch(config.xbm_start, warmup),
        average=average,
        steps=steps,
        workers=workers,
        pretrained=pretrained,
        share_texts=trial.shares_texts(),
        negatives=[
            prepare.texts(list(negatives[start : start + plan.chunk_size]))
            for start in range(0, len(negatives), plan.chunk_size)
        ],
        together=trial.chunks_together(plan),
    )
    if config.compile:  # last: what is measured before runs on a few pairs, for which nothing need be compiled
        compile_trunks(towers, config.compile_backend, accelerator.device)
    if state:
        run.restore(state)
    return run


def _check_backend(config: TrainConfig, backend: Backend) -> None:
    """Refuse what needs whole weights on every rank where each has a part of them."""
    asked = {
        f"--keep-graphs {config.keep_graphs}": config.keep_graphs not in (0, "auto"),
        f"--ema {config.ema}": config.ema > 0,
        "--compile": config.compile,
    }
    needed = [name for name, wanted in asked.items() if wanted]
    if backend.shards_weights and needed:
        raise InputError(
            f"{' and '.join(needed)}: not with FSDP2 or ZeRO 3, where a rank has a part of the weights; leave it out, "
            "or use DDP, ZeRO 1 or ZeRO 2"
        )


def _load_state(folder: Path | None, accelerator: Accelerator) -> TrainingState | None:
    if folder is None:
        return None
    return checkpoint.load_state(folder, accelerator.process_index, accelerator.num_processes)


def _check_same_run(config: TrainConfig, family: str, progress: dict) -> None:
    saved, its_family = progress["settings"], progress.get("family", family)
    if its_family != family:
        raise InputError(
            f"--resume {config.resume}: the checkpoint is one of train_{its_family}.py; go on with that script, or "
            "start anew from its weights with --model CHECKPOINT_FOLDER"
        )
    for name, value in settings_of_the_weights(config).items():
        if saved.get(name, value) != value:  # a setting that was not yet there when it was saved
            raise InputError(
                f"{flag(name)} {value} is not that of the checkpoint ({saved[name]}); resume with the same, or start "
                "anew from its weights with --model CHECKPOINT_FOLDER"
            )


def _workers(config: TrainConfig, state: TrainingState | None, plan: BatchPlan, prepare: Prepare) -> int:
    if config.workers != "auto":
        return config.workers
    if state:  # a stream of shards goes on exactly only at the same number
        return state.progress["workers"]
    if prepare.image_outputs is not None:  # nothing to decode
        return 0
    workers = most_workers(config, plan.world_size)
    if workers and Path("/dev/shm").is_dir():  # chunks travel through it; a container may have little
        chunk_bytes = plan.chunk_size * plan.image_bytes
        workers = min(workers, shutil.disk_usage("/dev/shm").free // (2 * plan.world_size * chunk_bytes))
    return min(gather_objects(workers))
