"""The training loop: data to step, and what is due after a step."""

import math
import signal
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lib import backend
from lib.cached_step import cached_step
from lib.checkpoint import newest_whole
from lib.collectives import gather_objects, rank_and_world_size, sum_over_ranks
from lib.config import TrainConfig
from lib.data import Chunk
from lib.data_setup import show_data
from lib.errors import InputError, RunError
from lib.evaluation.best import BestMetric
from lib.evaluation.validation import validate
from lib.finish import finish
from lib.first_step import prepare_first_step
from lib.losses import Loss, Pairs, diagonal
from lib.narration import all_counts, announce, memory_metrics, step_metrics
from lib.objective import Objective
from lib.report import SKIPPED, SUMMARY, Reporter
from lib.run import Run, Update
from lib.setup import make_run
from lib.towers import TwoTowers
from lib.xbm import Drift

MOST_OVERFLOWS = 50  # fp16 updates skipped in a row: by then the gradient scale is far below any useful one


def train(config: TrainConfig, objective: Objective) -> None:
    """Train as `config` says, from the first batch or a checkpoint to the export; files as the README lists them."""
    if config.data_info:
        show_data(config)
        return
    started = time.perf_counter()
    run = make_run(config, objective.family)
    loss = diagonal(objective.loss) if config.positives == "pair" else objective.loss
    best = BestMetric.resolve(config.best_metric, run.validation if config.eval_every else None)
    report = Reporter(run.folder, run.accelerator, run.steps, run.first_step)
    announce(run, report)
    if run.first_step >= run.steps and (run.folder / SUMMARY).exists():
        report.say(f"the run has its {run.steps} steps: nothing is left to do; more with a larger --steps or --epochs")
        run.accelerator.end_training()
        return
    with StopSignal() as stop:
        step = _loop(run, objective, loss, best, stop, report)
        finish(run, report, step, time.perf_counter() - started)


def _loop(run: Run, objective: Objective, loss: Loss, best: BestMetric, stop: "StopSignal", report: Reporter) -> int:
    """Data to step, and what is due after it; returns the last step that was done."""
    config, step = run.config, run.first_step
    batches = run.data.steps(run.first_step, run.steps)
    while (timed := _next_batch(batches, step + 1)) is not None:
        chunks, data_seconds = timed
        step += 1
        began = time.perf_counter()
        if step == run.first_step + 1:
            prepare_first_step(run, objective, chunks, report)
        remembered = run.memory.pairs() if run.switch.on else None
        update = _optimizer_step(run, loss, chunks, remembered, step)
        drift = _remember(run, update.result.fresh, step, report)
        seconds = time.perf_counter() - began + data_seconds
        memory = memory_metrics(run, step, remembered, drift) if run.memory.size else {}
        report.step(step_metrics(run, step, update, seconds, data_seconds) | memory)
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
        share=run.share_texts,
        together=run.together,
        **run.recompute,
    )
    grad_norm = float(backend.clip_gradients(run.accelerator, run.wrapped, run.config.grad_clip))
    lr = max(group["lr"] for group in run.optimizer.param_groups)
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
    if run.average and not run.overflows:
        run.average.update_parameters(run.towers)
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
            run.evaluated,
            run.validation,
            run.processing,
            partial(_validation_loss, run.evaluated, loss),
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
        reasons = ", ".join(f"{reason} {count}" for reason, count in all_counts(run)["skipped"].items())
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


def _diverged(run: Run, step: int, loss: float, grad_norm: float) -> str:
    """What to say about a loss or gradient that is not a number."""
    last = newest_whole(run.checkpoints)
    standing = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
    return (
        f"step {step}: loss {loss}, gradient norm {grad_norm}: training diverged; {standing}. "
        "Lower --lr, lengthen --warmup-steps or lower --grad-clip, and go on with --resume auto"
    )
