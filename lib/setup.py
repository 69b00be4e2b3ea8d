"""From settings to a run: data, towers, plan, optimizer and memory, or one clear error before the first batch."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from lib import checkpoint
from lib.averaging import WeightAverage
from lib.backends import Backend
from lib.checkpoint import TrainingState
from lib.collectives import gather_objects
from lib.config import TrainConfig, flag
from lib.data import Prepare, Source, TrainingData
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
from lib.logit_tiles import tile_side
from lib.model_setup import make_optimizer, make_towers
from lib.optim import build_schedule
from lib.plan import (
    LARGEST_CHUNK,
    BatchPlan,
    embedding_bytes,
    free_memory,
    gigabytes,
    graphs_that_fit,
    largest_chunk,
    measure_activations,
    pass_1_pairs,
    total_memory,
)
from lib.probe import Costs, largest_that_fits, measure_costs, peak_of_chunk
from lib.replay import batch_norms_that_train
from lib.run import Run, recompute_of, settings_of_the_weights
from lib.shared_texts import TEXT_INPUTS, Inputs, same_every_time
from lib.towers import Family, TwoTowers
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
    plan, costs = _plan(config, towers, source, prepare, state, backend)
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
        share_texts=_share_texts(config, towers, source, prepare, backend),
        negatives=[
            prepare.texts(list(negatives[start : start + plan.chunk_size]))
            for start in range(0, len(negatives), plan.chunk_size)
        ],
        together=_chunks_together(plan, towers, source, prepare, backend),
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


def _share_texts(config: TrainConfig, towers: TwoTowers, source: Source, prepare: Prepare, backend: Backend) -> bool:
    """Whether to encode each distinct text of a step once: where that is exact, on all ranks alike.

    Not where weights are sharded: ranks would differ in the chunks that have texts, and must run the same forwards.
    """
    if backend.shards_weights or config.shared_texts == "off":
        return False
    inputs = _sample_inputs(source, prepare, backend)
    texts = {name: tensor for name, tensor in inputs.items() if name in TEXT_INPUTS}
    with backend.autocast():
        return all(gather_objects(same_every_time(towers, texts)))


def _chunks_together(plan: BatchPlan, towers: TwoTowers, source: Source, prepare: Prepare, backend: Backend) -> int:
    """Chunks that pass 1 embeds in one forward: more than one where that is exact, on all ranks alike.

    Not where weights are sharded: ranks differ in which neighbours have texts of one length.
    """
    together = max(1, plan.pass_1_pairs // plan.chunk_size)
    if together == 1 or backend.shards_weights or batch_norms_that_train(towers):
        return 1
    inputs = _sample_inputs(source, prepare, backend)
    with backend.autocast():
        exact = all(gather_objects(same_every_time(towers, inputs)))
    return together if exact else 1


def _sample_inputs(source: Source, prepare: Prepare, backend: Backend) -> Inputs:
    device = backend.accelerator.device
    return {name: tensor.to(device) for name, tensor in sample_inputs(source, prepare).items()}


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


def _plan(
    config: TrainConfig,
    towers: TwoTowers,
    source: Source,
    prepare: Prepare,
    state: TrainingState | None,
    backend: Backend,
) -> tuple[BatchPlan, Costs]:
    """Try the towers on texts of the data, and settle what is `auto`, alike on all ranks."""
    device, world_size = backend.accelerator.device, backend.accelerator.num_processes
    inputs = _sample_inputs(source, prepare, backend)
    with backend.autocast():
        activations = measure_activations(towers, inputs)
    per_rank = config.effective_batch // world_size
    chunk_size, keep = config.chunk_size, config.keep_graphs
    if state:  # what was measured then holds, so that dropout's masks and sums stay the same
        chunk_size = state.progress["chunk_size"] if chunk_size == "auto" else chunk_size
        keep = state.progress["keep_graphs"] if keep == "auto" else keep
    if isinstance(chunk_size, str):  # auto
        fits: int = min(gather_objects(_largest_chunk(config, towers, inputs, activations, backend)))
        chunk_size = fits
    plan = BatchPlan(
        effective_batch=config.effective_batch,
        world_size=world_size,
        chunk_size=chunk_size,
        keep_graphs=0,
        xbm_size=config.xbm_size,
        embed_dim=towers.embed_dim,
        image_bytes=prepare.image_bytes,
        activation_bytes=activations,
        state_bytes=_state_bytes(config, towers, backend),
        tile=tile_side(device),
        pass_1_pairs=pass_1_pairs(device),
    )
    if plan.embedding_bytes > total_memory(device):
        raise InputError(
            f"--effective-batch {config.effective_batch} and --xbm-size {config.xbm_size} take "
            f"{gigabytes(plan.embedding_bytes)} for embeddings alone, and {device.type} has "
            f"{gigabytes(total_memory(device))}; lower them"
        )
    if backend.shards_weights:
        keep = 0
    elif isinstance(keep, str):  # auto
        graphs: int = min(gather_objects(graphs_that_fit(plan, device, world_size)))
        keep = graphs
    with backend.autocast():
        recompute = recompute_of(towers)
        costs = measure_costs(
            towers, inputs, min(chunk_size, per_rank), device, recompute["image_recompute"], recompute["text_recompute"]
        )
    return replace(plan, keep_graphs=min(keep, plan.chunks)), costs


def _largest_chunk(
    config: TrainConfig, towers: TwoTowers, inputs: dict[str, torch.Tensor], activations: int, backend: Backend
) -> int:
    """C for --chunk-size auto: tried on an accelerator; reckoned on a CPU, where one too large ends the process."""
    device, per_rank = backend.accelerator.device, config.effective_batch // backend.accelerator.num_processes
    if device.type == "cpu":
        return largest_chunk(activations, per_rank)
    # To come beside the chunk: gradients and moments, and the embeddings with the loss's tiles.
    weights = sum(parameter.nbytes for parameter in towers.parameters())
    room = free_memory(device) - (_state_bytes(config, towers, backend) - weights)
    room -= embedding_bytes(config.effective_batch, config.xbm_size, towers.embed_dim, tile_side(device))
    with backend.autocast():
        return largest_that_fits(partial(peak_of_chunk, towers, inputs, device), min(per_rank, LARGEST_CHUNK), room)


def _state_bytes(config: TrainConfig, towers: TwoTowers, backend: Backend) -> int:
    """Weights, their average, gradients and moments, on one rank."""
    weights = sum(parameter.nbytes for parameter in towers.parameters())
    trained = sum(parameter.nbytes for parameter in towers.parameters() if parameter.requires_grad)
    moments = 0 if config.optimizer == "sgd" else 2
    return backend.state_bytes(weights, trained, moments) + (weights if config.ema else 0)
