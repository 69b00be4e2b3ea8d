"""From settings to a run: data, towers, plan, optimizer and memory, or one clear error before the first batch."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from lib import backend, checkpoint
from lib.averaging import WeightAverage
from lib.checkpoint import TrainingState
from lib.collectives import gather_objects
from lib.config import TrainConfig, flag
from lib.data import Prepare, Source, TrainingData
from lib.data_setup import make_fetcher, make_prepare, most_workers, open_data, sample_inputs, steps_of_epochs
from lib.errors import InputError
from lib.logit_tiles import tile_side
from lib.model_setup import make_optimizer, make_towers
from lib.optim import build_schedule
from lib.plan import PASS_1_PAIRS, BatchPlan, graphs_that_fit, largest_chunk, measure_activations, state_bytes
from lib.replay import batch_norms_that_train
from lib.report import METRICS
from lib.run import Run, settings_of_the_weights
from lib.shared_texts import TEXT_INPUTS, Inputs, same_every_time
from lib.towers import TwoTowers
from lib.trunk_options import compile_trunks
from lib.xbm import CrossBatchMemory, MemorySwitch


def make_run(config: TrainConfig, family: str) -> Run:
    """Build everything that the settings ask for, or raise InputError before the first batch."""
    accelerator = backend.start(config.tracker)
    folder = _claim_folder(config, family, accelerator)
    resume_from = checkpoint.find_resume(config.resume, folder / "checkpoints")
    state = _load_state(resume_from, accelerator)
    if state:
        _check_same_run(config, state.progress["settings"])
    fetcher = make_fetcher(config)
    source, validation = open_data(config, fetcher)
    torch.manual_seed(config.seed)
    towers, processing, pretrained = make_towers(config, family, source, resume_from, state)
    towers.to(accelerator.device).train()
    torch.manual_seed(config.seed + 1 + accelerator.process_index)  # ranks draw their own dropout masks

    prepare = make_prepare(config, towers, processing, source, fetcher.cache, accelerator.device)
    plan = _plan(config, towers, source, prepare, state, accelerator)
    workers = _workers(config, state, plan, prepare)
    steps = config.steps or steps_of_epochs(config, source)
    warmup = steps // 10 if config.warmup_steps == "auto" else config.warmup_steps
    optimizer = make_optimizer(config, towers, fused=accelerator.scaler is None)
    schedule = build_schedule(optimizer, config.schedule, warmup, steps)
    average = WeightAverage(towers, config.ema) if config.ema else None
    wrapped, prepared_optimizer = accelerator.prepare(towers, optimizer)
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        source=source,
        validation=validation,
        towers=towers,
        processing=processing,
        prepare=prepare,
        wrapped=wrapped,
        optimizer=prepared_optimizer,
        schedule=schedule,  # not prepared: Accelerate would step it once per process
        plan=plan,
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
        share_texts=_share_texts(config, towers, source, prepare, accelerator),
        together=_chunks_together(config, towers, source, prepare, plan.chunk_size, accelerator),
    )
    if config.compile:  # last: what is measured before runs on a few pairs, for which nothing need be compiled
        compile_trunks(towers, config.compile_backend, accelerator.device)
    if state:
        run.restore(state)
    return run


def _share_texts(
    config: TrainConfig, towers: TwoTowers, source: Source, prepare: Prepare, accelerator: Accelerator
) -> bool:
    """Whether to encode each distinct text of a step once: where that is exact, on all ranks alike."""
    if config.shared_texts == "off":
        return False
    inputs = _sample_inputs(source, prepare, accelerator)
    texts = {name: tensor for name, tensor in inputs.items() if name in TEXT_INPUTS}
    with accelerator.autocast():
        return all(gather_objects(same_every_time(towers, texts)))


def _chunks_together(
    config: TrainConfig,
    towers: TwoTowers,
    source: Source,
    prepare: Prepare,
    chunk_size: int,
    accelerator: Accelerator,
) -> int:
    """Chunks that pass 1 embeds in one forward: more than one where that is exact, on all ranks alike."""
    if batch_norms_that_train(towers):
        return 1
    inputs = _sample_inputs(source, prepare, accelerator)
    with accelerator.autocast():
        exact = all(gather_objects(same_every_time(towers, inputs)))
    return max(1, PASS_1_PAIRS // chunk_size) if exact else 1


def _sample_inputs(source: Source, prepare: Prepare, accelerator: Accelerator) -> Inputs:
    return {name: tensor.to(accelerator.device) for name, tensor in sample_inputs(source, prepare).items()}


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


def _check_same_run(config: TrainConfig, saved: dict) -> None:
    for name, value in settings_of_the_weights(config).items():
        if saved[name] != value:
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


def _plan(
    config: TrainConfig,
    towers: TwoTowers,
    source: Source,
    prepare: Prepare,
    state: TrainingState | None,
    accelerator: Accelerator,
) -> BatchPlan:
    """Measure the towers on texts of the data, and settle what is `auto`, alike on all ranks."""
    device, world_size = accelerator.device, accelerator.num_processes
    inputs = _sample_inputs(source, prepare, accelerator)
    with accelerator.autocast():
        activations = measure_activations(towers, inputs)
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
        image_bytes=prepare.image_bytes,
        activation_bytes=activations,
        state_bytes=_state_bytes(config, towers),
        tile=tile_side(device),
    )
    if keep == "auto":
        keep = min(gather_objects(graphs_that_fit(plan, device, world_size)))
    return replace(plan, keep_graphs=min(keep, plan.chunks))


def _state_bytes(config: TrainConfig, towers: TwoTowers) -> int:
    """Weights, their average, gradients and moments."""
    parameters = list(towers.parameters())
    average = sum(parameter.nbytes for parameter in parameters) if config.ema else 0
    return state_bytes(parameters, moments=0 if config.optimizer == "sgd" else 2) + average
