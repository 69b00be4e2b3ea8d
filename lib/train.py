"""The training loop: data to step, and what is due after a step."""

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lib import backend, verify
from lib.cached_step import StepResult, cached_step
from lib.checkpoint import merge_counts, newest_whole
from lib.collectives import gather_objects, gather_rows, rank_and_world_size, sum_over_ranks
from lib.config import TrainConfig, save_config
from lib.data import Chunk
from lib.errors import InputError, RunError
from lib.evaluation.best import BestMetric
from lib.evaluation.validation import validate
from lib.export import export
from lib.logit_bias import bias_from_counts, solved_bias
from lib.losses import Loss, Pairs, diagonal
from lib.objective import Objective
from lib.plan import oversize_warning
from lib.report import SKIPPED, SUMMARY, Reporter
from lib.run import Run, make_run
from lib.towers import TwoTowers
from lib.xbm import Drift

MOST_OVERFLOWS = 50  # fp16 updates skipped in a row: by then the gradient scale is far below any useful one


def train(config: TrainConfig, objective: Objective) -> None:
    """Train as `config` says, from the first batch or a checkpoint to the export; files as the README lists them."""
    started = time.perf_counter()
    run = make_run(config, objective.family)
    loss = diagonal(objective.loss) if config.positives == "pair" else objective.loss
    best = BestMetric.resolve(config.best_metric, run.validation if config.eval_every else None)
    report = Reporter(run.folder, run.accelerator, run.steps, run.first_step)
    _announce(run, report)
    if run.first_step >= run.steps and (run.folder / SUMMARY).exists():
        report.say(f"the run has its {run.steps} steps: nothing is left to do; more with a larger --steps or --epochs")
        run.accelerator.end_training()
        return
    with StopSignal() as stop:
        step = _loop(run, objective, loss, best, stop, report)
        _finish(run, report, step, time.perf_counter() - started)


def _loop(run: Run, objective: Objective, loss: Loss, best: BestMetric, stop: "StopSignal", report: Reporter) -> int:
    """Data to step, and what is due after it; returns the last step that was done."""
    config, step = run.config, run.first_step
    batches = run.data.steps(run.first_step, run.steps)
    while (timed := _next_batch(batches, step + 1)) is not None:
        chunks, data_seconds = timed
        step += 1
        began = time.perf_counter()
        if step == run.first_step + 1:
            _prepare_first_step(run, objective, chunks, report)
        remembered = run.memory.pairs() if run.switch.on else None
        update = _optimizer_step(run, loss, chunks, remembered, step)
        drift = _remember(run, update.result.fresh, step, report)
        seconds = time.perf_counter() - began + data_seconds
        memory = _memory_metrics(run, step, remembered, drift) if run.memory.size else {}
        report.step(_metrics(run, step, update, seconds, data_seconds) | memory)
        if run.validation and _due(step, config.eval_every, run.steps):
            _evaluate(run, loss, best, step, report)
        stopping = _agree(run, stop, step, report)
        is_best = run.best.get("step") == step
        if stopping or (config.save_every and (is_best or _due(step, config.save_every, run.steps))):
            run.save(step)
        if stopping and step < run.steps:
            report.say(f"stopped by a signal: step {step} is saved, --resume auto goes on from here")
            break
        del timed, chunks  # or two steps' images would be held while the next is waited for
    return step


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer step: what the cached step found, the norm of the gradients, and the rate that was used."""

    result: StepResult
    grad_norm: float
    lr: float


def _optimizer_step(run: Run, loss: Loss, chunks: list[Chunk], remembered: Pairs | None, step: int) -> Update:
    """Gradients of the whole batch, clipped; one update of weights and rate."""
    result = cached_step(
        run.wrapped,
        chunks,
        loss,
        remembered,
        device=run.accelerator.device,
        backward=run.accelerator.backward,
        no_sync=backend.no_sync(run.accelerator, run.wrapped),
        keep_graphs=run.plan.keep_graphs,
        **run.recompute,
    )
    grad_norm = float(backend.clip_gradients(run.accelerator, run.wrapped, run.config.grad_clip))
    lr = run.optimizer.param_groups[0]["lr"]
    scaled = run.accelerator.scaler is not None  # fp16: an overflow is skipped by the scaler, and no fault
    if not math.isfinite(result.loss.item()) or not (scaled or math.isfinite(grad_norm)):
        raise RunError(_diverged(run, step, result.loss.item(), grad_norm))
    run.optimizer.step()
    run.overflows = run.overflows + 1 if run.optimizer.step_was_skipped else 0
    if run.overflows > MOST_OVERFLOWS:
        raise RunError(_diverged(run, step, result.loss.item(), grad_norm))
    if not run.overflows:
        run.schedule.step()
    run.optimizer.zero_grad()
    if run.config.scale_max:
        run.towers.clamp_logit_scale(run.config.scale_max)
    return Update(result, grad_norm, lr)


def _remember(run: Run, fresh: Pairs, step: int, report: Reporter) -> Drift:
    """Read the drift of recurring samples, then put this step's embeddings into the memory."""
    drift, was_full = run.memory.drift(fresh), len(run.memory) == run.memory.size
    run.memory.enqueue(fresh, step)
    if run.memory.size:
        before = run.switch.on
        run.switch.update(step, drift, was_full)
        if run.switch.on and not before:
            report.say(f"step {step + 1}: the memory is used from here on")
    return drift


def _evaluate(run: Run, loss: Loss, best: BestMetric, step: int, report: Reporter) -> None:
    """Measure on validation data, on all ranks; note whether it is the best so far."""
    with run.accelerator.autocast():
        metrics = validate(
            run.towers,
            run.validation,
            run.processing,
            partial(_validation_loss, run.towers, loss),
            device=run.accelerator.device,
            batch_size=min(256, run.plan.chunk_size * 2),
            workers=run.workers,
        )
    report.evaluation(step, metrics)
    value = best.value(metrics)
    if best.better(value, run.best.get("value")):
        run.best = {"step": step, "metric": best.name, "value": value}


@torch.no_grad()
def _validation_loss(towers: TwoTowers, loss: Loss, image_embeds: Tensor, text_embeds: Tensor, group: Tensor) -> float:
    """The loss of these pairs as one batch, without memory; every rank takes its share of the rows."""
    count = len(group)
    pairs = Pairs(image_embeds, text_embeds, group, torch.arange(count, device=group.device))
    rank, world_size = rank_and_world_size()
    rows = slice(rank * count // world_size, (rank + 1) * count // world_size)
    with torch.autocast(group.device.type, enabled=False):  # losses are float32, whatever the towers' precision
        share = loss(pairs, None, towers.logit_scale.exp(), towers.logit_bias, rows)
    return sum_over_ranks(share.loss.clone()).item()


def _prepare_first_step(run: Run, objective: Objective, chunks: list[Chunk], report: Reporter) -> None:
    """Before the first update: start the bias where the data wants it, and verify the gradients if asked."""
    fresh_bias = run.first_step == 0 and run.towers.use_bias and not run.towers.pretrained_bias
    if objective.family == "siglip" and fresh_bias:
        bias = _start_bias(run, chunks)
        run.towers.set_scale_and_bias(None, bias)
        report.say(f"logit_bias starts at {bias:.3f}")
    if run.config.verify_gradients:
        _verify(run, objective, chunks, report)


@torch.no_grad()
def _start_bias(run: Run, chunks: list[Chunk]) -> float:
    """From the counts for towers that start fresh; solved on embeddings for a softmax-trained CLIP."""
    device = run.accelerator.device
    group = gather_rows(torch.cat([chunk.group for chunk in chunks]).to(device))
    if run.config.positives == "pair":
        group = torch.arange(len(group), device=device)
    if not run.pretrained:
        return bias_from_counts(group, run.config.xbm_size)
    first = chunks[0].to(device)
    output = run.wrapped(first.pixel_values, first.input_ids, first.attention_mask)
    images, texts = gather_rows(output.image_embeds), gather_rows(output.text_embeds)
    own = gather_rows(first.group) if run.config.positives == "group" else torch.arange(len(images), device=device)
    return solved_bias(Pairs(images, texts, own, own), output.logit_scale)


def _verify(run: Run, objective: Objective, chunks: list[Chunk], report: Reporter) -> None:
    """Compare the cached step with plain autograd on a few pairs; stop where they differ."""
    few, device = verify.small_chunks(chunks), run.accelerator.device
    pairwise = run.config.positives == "pair"
    loss = diagonal(objective.loss) if pairwise else objective.loss
    no_sync = backend.no_sync(run.accelerator, run.wrapped)
    cached = partial(cached_step, run.wrapped, few, loss, None, device=device, no_sync=no_sync, **run.recompute)
    plain = partial(verify.plain_autograd, run.wrapped, run.towers, few, objective.dense, pairwise, device)
    differences = verify.compare_gradients(run.towers, cached, plain, device)
    tolerance = verify.TOLERANCE[run.accelerator.mixed_precision]
    report.say(
        "verify-gradients: largest relative difference "
        + ", ".join(f"{part} {difference:.1e}" for part, difference in differences.items())
    )
    if not all(difference <= tolerance for difference in differences.values()):
        raise RunError(
            f"--verify-gradients: the cached step's gradients differ from plain autograd's by more than {tolerance} "
            f"({differences}); batch norm in training mode and chunk-dependent layers do this, else it is a fault here"
        )


class StopSignal:
    """Within it, SIGTERM and a first Ctrl-C only set a flag; the ranks agree on it after a step."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


def _agree(run: Run, stop: "StopSignal", step: int, report: Reporter) -> bool:
    """One small reduction over the ranks: was any told to stop, and which pairs could none of them read?

    Too many unreadable pairs end the run here.
    """
    counts, new_skips = run.data.counts, run.data.new_skips()
    found_early = len(run.source.skipped) if run.accelerator.is_main_process else 0
    bad, read = sum(counts.skipped.values()) - found_early, counts.read - found_early
    numbers = torch.tensor([int(stop.received), len(new_skips), bad, read], device=run.accelerator.device)
    told, fresh_skips, bad, read = sum_over_ranks(numbers).tolist()
    if fresh_skips:
        report.skipped(step, [skip for of_rank in gather_objects(new_skips) for skip in of_rank])
    total = run.source.size or max(read, 100)
    if bad > run.config.max_bad * total:
        reasons = ", ".join(f"{reason} {count}" for reason, count in _all_counts(run)["skipped"].items())
        raise RunError(
            f"{bad} of {total} pairs cannot be read ({reasons}), more than --max-bad {run.config.max_bad}; they are "
            f"listed in {run.folder / SKIPPED}: mend them or raise --max-bad"
        )
    return told > 0


def _next_batch(batches: Iterator[list[Chunk]], step: int) -> tuple[list[Chunk], float] | None:
    """The next step's chunks and the seconds spent waiting for them."""
    began = time.perf_counter()
    try:
        chunks = next(batches, None)
    except InputError as error:
        rank = rank_and_world_size()[0]
        raise RunError(f"step {step}, rank {rank}: {error}", of_one_rank=True) from error
    return None if chunks is None else (chunks, time.perf_counter() - began)


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _metrics(run: Run, step: int, update: Update, seconds: float, data_seconds: float) -> dict:
    """A line of metrics.jsonl."""
    pairs = step * run.plan.effective_batch
    return {
        "step": step,
        "epoch": pairs / run.source.size if run.source.size else None,
        "loss": update.result.loss.item(),
        "lr": update.lr,
        "logit_scale": run.towers.logit_scale.exp().item(),
        "logit_bias": run.towers.logit_bias.item(),
        "grad_norm": update.grad_norm,
        "pairs_per_second": run.plan.effective_batch / seconds,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "peak_memory_bytes": backend.peak_memory_bytes(run.accelerator.device),
        "replay_difference": update.result.replay_difference.item(),
    }


def _memory_metrics(run: Run, step: int, remembered: Pairs | None, drift: Drift) -> dict:
    return {
        "xbm_used": 0 if remembered is None else len(remembered),
        "xbm_filled": len(run.memory),
        "xbm_age": run.memory.mean_age(step),
        "drift_image": drift.image,
        "drift_text": drift.text,
        "drift_samples": drift.samples,
    }


def _announce(run: Run, report: Reporter) -> None:
    """The start-up plan, and the settings as a file."""
    config, towers = run.config, run.towers
    total = sum(p.numel() for p in towers.parameters())
    trained = sum(p.numel() for p in towers.parameters() if p.requires_grad)
    texts = "" if run.source.distinct_texts is None else f", {run.source.distinct_texts:,} distinct texts"
    name = f"{config.image_tower} and {config.text_tower}" if config.image_tower else config.model
    report.say(
        f"model      {name}: {total:,} parameters, {trained:,} train; {towers.embed_dim} dimensions, "
        f"{towers.image_size} px",
        f"data       {run.source.description}{texts}",
        *run.plan.lines(),
        f"steps      {run.steps:,} (from {run.first_step:,})" if run.first_step else f"steps      {run.steps:,}",
        f"run        {run.folder}",
    )
    for warning in (
        oversize_warning(config.effective_batch, config.xbm_size, run.source.size),
        f"--lr {config.lr:g} is high for pretrained weights; 1e-5 is usual"
        if run.pretrained and config.lr > 2e-4
        else None,
        "no validation data: --val-data measures while training" if config.eval_every and not run.validation else None,
        f"{len(run.source.skipped):,} pairs cannot be used and are left out" if run.source.skipped else None,
    ):
        if warning:
            report.say(f"warning: {warning}")
    if run.accelerator.is_main_process:
        save_config(config, run.folder / "config.yaml")
    if config.tracker != "none":
        run.accelerator.project_configuration.logging_dir = str(run.folder)
        flat = {n: v for n, v in dataclasses.asdict(config).items() if isinstance(v, int | float | str)}
        run.accelerator.init_trackers("image-text", config=flat)


def _all_counts(run: Run) -> dict:
    """Pairs read, used and skipped in the first pass over the data, over all ranks."""
    return merge_counts(gather_objects(dataclasses.asdict(run.data.counts)))


def _finish(run: Run, report: Reporter, step: int, seconds: float) -> None:
    """Curve, summary and, after the last step, the export of the best checkpoint."""
    summary = {
        "steps": step,
        "pairs": step * run.plan.effective_batch,
        "wall_seconds": seconds,
        "peak_memory_bytes": max(gather_objects(backend.peak_memory_bytes(run.accelerator.device))),
        "eval": report.last_evaluation,
        "best": run.best,
        "data": _all_counts(run),
    }
    if run.memory.size and not run.switch.on and step == run.steps:
        report.say(
            "warning: the memory was never used: warm-up lasted, or remembered embeddings kept drifting (drift_image "
            "and drift_text in metrics.jsonl); --xbm-start STEP uses it from a step on, --xbm-size 0 saves its room"
        )
    report.curve()
    report.summary(summary)
    if step == run.steps and run.accelerator.is_main_process:
        report.summary(summary | {"export_difference": _export(run, report)})
    report.close()
    run.accelerator.wait_for_everyone()  # rank 0 exports alone: the others must not end the group before it has
    run.accelerator.end_training()


def _export(run: Run, report: Reporter) -> float:
    """Write the best model (the last one without evaluations) in the Hugging Face layout, and check it."""
    # Accelerate's mixed precision is an instance's own `forward`; the check compares with a plain float32 model.
    vars(run.towers).pop("forward", None)
    towers = run.towers
    best = run.checkpoints / "best"
    if run.best and best.exists():
        towers = TwoTowers.from_pretrained(best)
    folder = run.folder / "export"
    difference = export(towers.cpu().eval(), run.processing, folder, _export_sample(run))
    report.say(f"exported to {folder}: largest logit difference {difference:.1e}")
    return difference


def _export_sample(run: Run) -> Chunk:
    """Noise as images, and texts of the data: enough to tell one model from another."""
    texts = (run.source.sample_texts(8) or ["a text"])[:8]
    side, count = run.processing.image_size, len(texts)
    generator = torch.Generator().manual_seed(run.config.seed)
    pixels = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return Chunk(pixels, *run.processing.tokenize(texts), torch.arange(count), torch.arange(count))


def _diverged(run: Run, step: int, loss: float, grad_norm: float) -> str:
    """What to say about a loss or gradient that is not a number."""
    last = newest_whole(run.checkpoints)
    standing = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
    return (
        f"step {step}: loss {loss}, gradient norm {grad_norm}: training diverged; {standing}. "
        "Lower --lr, lengthen --warmup-steps or lower --grad-clip, and go on with --resume auto"
    )
