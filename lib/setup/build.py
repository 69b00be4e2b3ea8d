"""Build a run from its settings: data, model, plan, optimizer, resume; or one clear error before the first batch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lib.backends import Backend
from lib.backends.device import device_faults_reported
from lib.backends.optim import WeightAverage, build_schedule
from lib.config import FITTED, FittedConfig, TrainConfig, flag
from lib.data import Prepare, Source, TrainingData
from lib.distributed import decided_by_rank_0
from lib.errors import InputError
from lib.gradcache.prefetch import Inputs
from lib.gradcache.step import GradCache, Recompute
from lib.losses.objective import Objective
from lib.losses.xbm import CrossBatchMemory, MemorySwitch
from lib.runs import checkpoint
from lib.runs.blend import copy_initial
from lib.runs.checkpoint import TrainingState
from lib.runs.progress import Progress
from lib.setup.data import (
    Loading,
    TextLengths,
    chunks_ahead,
    make_fetcher,
    make_prepare,
    negative_texts,
    open_data,
    sample_inputs,
    steps_of_epochs,
    workers_asked,
)
from lib.setup.head_start import fit_heads
from lib.setup.model import choose_what_trains, make_optimizer, make_towers
from lib.setup.plan import make_plan, shares_texts
from lib.setup.recipe import Facts, fitted, start_of
from lib.setup.run import Data, Model, Run, Step, same_text, settings_of_the_weights
from lib.setup.tower_outputs import FrozenTrunks


def make_run(asked: TrainConfig, objective: Objective, backend: Backend, folder: Path) -> Run:
    """Build everything that the settings ask for in the run's folder, or raise InputError before the first batch."""
    accelerator, device, family = backend.accelerator, backend.accelerator.device, objective.family
    _check_backend(asked, backend)
    resume_from, warnings = decided_by_rank_0(lambda: checkpoint.find_resume(asked.resume, folder / "checkpoints"))
    if resume_from and accelerator.is_main_process:
        copy_initial(resume_from, folder)
    state = _load_state(resume_from, accelerator)
    if state:
        asked = as_in_the_checkpoint(asked, state.progress)
        _check_same_run(asked, family, state.progress)
    with device_faults_reported(None):
        # Data
        fetcher = make_fetcher(asked)
        source, validation = open_data(asked, fetcher, folder)
        # Model
        torch.manual_seed(asked.seed)
        towers, processing = make_towers(asked, family, source, resume_from)
        config, choices = fitted(asked, family, lambda: Facts.of(asked, source, towers, device))
        choose_what_trains(config, towers, state)
        towers.to(device).train()
        # Data as this model reads it
        negatives = negative_texts(config, source)
        trunks = FrozenTrunks(towers, processing, fetcher.cache, backend.precision, workers_asked(config, device))
        prepare = make_prepare(config, processing, source, negatives, trunks)
        if config.head_epochs and not state:
            fit_heads(config, objective, towers, source, same_text(config, source), trunks, prepare)
        torch.manual_seed(config.seed + 1 + accelerator.process_index)  # ranks draw their own dropout masks
        # Plan, made while every rank still has all weights
        inputs = sample_inputs(source, prepare, device)
        share_texts = shares_texts(backend, towers, inputs)
        plan = make_plan(config, backend, towers, inputs, prepare.image_bytes, state.progress if state else None)
        loading = Loading.plan(config, state, prepare, device)
        plan = replace(plan, chunks_ahead=chunks_ahead(plan, loading.workers))
    steps, warmup = _steps_and_warmup(config, source)
    with device_faults_reported(plan.chunk_pairs):
        # Optimizer
        optimizer = make_optimizer(config, towers, fused=backend.loss_scale is None)
        average = WeightAverage(towers, config.ema) if config.ema else None
        wrapped = backend.prepare(towers, optimizer, config.grad_clip)
        schedule = build_schedule(optimizer, config.schedule, warmup, steps)  # after: it knows the final groups
        cache = GradCache(
            wrapped,
            device,
            backward=backend.backward,
            no_sync=backend.no_sync,
            keep_graphs=plan.keep_graphs,
            image_recompute=_recompute(towers.image_frozen, towers.image_trunk_frozen),
            text_recompute=_recompute(towers.text_frozen, towers.text_trunk_frozen),
            share_texts=share_texts,
            negatives=_in_chunks(negatives, prepare, plan.chunk_size, device),
        )
        training = TrainingData(
            source,
            prepare,
            effective_batch=config.effective_batch,
            chunk_size=plan.chunk_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            workers=loading.workers,
            seed=config.seed,
            chunks_ahead=plan.chunks_ahead,
            part_size=loading.part_size,
            pin_memory=device.type == "cuda",
        )
        memory = CrossBatchMemory(config.xbm_size, towers.embed_dim, device)
        text_lengths = TextLengths.of(source, processing) if accelerator.is_main_process else None
        evaluated = average.module if average else towers
        run = Run(
            config,
            family,
            backend,
            folder,
            Model(towers, processing, start_of(config) == "pretrained", optimizer, schedule, average, evaluated),
            Data(source, validation, prepare, loading, training, text_lengths),
            Step(cache, plan, memory, MemorySwitch(config.xbm_start, warmup)),
            Progress(steps, config.patience),
            choices,
            warnings,
        )
        if state:
            run.restore(state)
        return run


def _steps_and_warmup(config: FittedConfig, source: Source) -> tuple[int, int]:
    """Optimizer steps of the run, and how many of them warm up."""
    steps = config.steps or steps_of_epochs(config, source)
    warmup = steps // 10 if config.warmup_steps == "auto" else config.warmup_steps
    if warmup > steps:
        raise InputError(f"--warmup-steps {warmup} are more than the run's {steps} steps; lower them, or add --steps")
    return steps, warmup


def _recompute(tower_frozen: bool, trunk_frozen: bool) -> Recompute:
    return "none" if tower_frozen else "head" if trunk_frozen else "all"


def _in_chunks(texts: Sequence[str], prepare: Prepare, size: int, device: torch.device) -> list[Inputs]:
    """The inputs of these texts on the device, at most `size` in a forward."""
    chunks = (texts[start : start + size] for start in range(0, len(texts), size))
    return [{name: tensor.to(device) for name, tensor in prepare.texts(list(some)).items()} for some in chunks]


def _check_backend(config: TrainConfig, backend: Backend) -> None:
    """Refuse settings that need all weights on every rank, where each rank has a part of them."""
    asked = {
        f"--keep-graphs {config.keep_graphs}": config.keep_graphs not in (0, "auto", None),
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
    saved, its_family = _saved_settings(progress), progress.get("family", family)
    if its_family != family:
        raise InputError(
            f"--resume {config.resume}: the checkpoint is one of train_{its_family}.py; resume with that script, or "
            "start anew from its weights with --model CHECKPOINT_FOLDER"
        )
    if config.lora and saved.get("lora_alpha") not in (None, 2 * config.lora):
        raise InputError(
            f"--resume {config.resume}: its adapters were trained with --lora-alpha {saved['lora_alpha']}, and are now "
            "always scaled by 2 x --lora; start anew from its weights with --model CHECKPOINT_FOLDER"
        )
    for name, value in settings_of_the_weights(config).items():
        if saved.get(name, value) != value:  # a setting that was not yet there when it was saved
            raise InputError(
                f"{flag(name)} {value} is not that of the checkpoint ({saved[name]}); resume with the same, or start "
                "anew from its weights with --model CHECKPOINT_FOLDER"
            )


def as_in_the_checkpoint(config: TrainConfig, progress: dict) -> TrainConfig:
    """The settings with the values that a checkpoint chose for what is still auto.

    Checkpoints of earlier versions chose nothing, and had the defaults of the digits.
    """
    saved = vars(FittedConfig()) | _saved_settings(progress) | progress.get("fitted", {})
    if config.lr != "auto" and saved["head_lr"] == saved["lr"]:
        saved["head_lr"] = config.lr  # it follows --lr, which may change
    auto = [name for name in FITTED if getattr(config, name) in ("auto", ("auto",))]
    values: dict[str, Any] = {name: tuple(saved[name]) if name == "freeze" else saved[name] for name in auto}
    return replace(config, **values)


def _saved_settings(progress: dict) -> dict:
    """A checkpoint's settings; earlier versions had flags for each tower's head, and for each place of dropout."""
    saved = dict(progress["settings"])
    image_head, text_head = saved.get("projection"), saved.get("text_projection", "same")
    if isinstance(image_head, str):
        saved["projection"] = [image_head] if text_head in ("same", image_head) else [image_head, text_head]
    if "projection_dropout" in saved:
        saved["dropout"] = saved["dropout"] or saved["projection_dropout"] or saved.get("lora_dropout", 0.0)
    return saved
