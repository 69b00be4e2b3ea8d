"""The training loop: data to step, and what is due after a step."""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lib import backends
from lib.backends.device import device_faults_reported
from lib.backends.optim import scheduled_scale
from lib.backends.precision import full_float32
from lib.config import TrainConfig
from lib.data import Chunk, StepChunks
from lib.distributed import gather_objects, rank_and_world_size, sum_counts, sum_over_ranks
from lib.errors import InputError, RunError, StoppedEarly, machine_errors_reported
from lib.evaluation.validation import BestMetric, validate
from lib.finish import finish, is_finished
from lib.gradcache.inputs import Chunks
from lib.gradcache.step import cached_step
from lib.losses import Loss, Pairs
from lib.losses.objective import Objective
from lib.losses.xbm import Drift
from lib.runs.checkpoint import newest_whole
from lib.runs.folder import claimed_folder
from lib.runs.reporter import SKIPPED, Reporter
from lib.runs.signals import StepGivenUp, StopSignal
from lib.runs.watchdog import Watchdog
from lib.setup.announce import all_counts, announce, step_metrics, step_timing
from lib.setup.build import make_run
from lib.setup.data import show_data
from lib.setup.first_step import prepare_first_step
from lib.setup.run import BeforeStep, Run, Update
from lib.towers import TwoTowers

MOST_OVERFLOWS = 50  # fp16 updates skipped in a row: by then the gradient scale is far below any useful one


def train(config: TrainConfig, objective: Objective) -> None:
    """Train as `config` says, from the first batch or a checkpoint to the export; files as the README lists them."""
    if config.data_info:
        show_data(config)
        return
    backend = backends.start(config.tracker, config.precision, config.deterministic)
    with (
        claimed_folder(config, objective.family) as folder,
        Watchdog(),
        machine_errors_reported(partial(_standing, folder)),
    ):
        _train(make_run(config, objective.family, backend, folder), objective)


def _standing(folder: Path) -> str:
    """What to say at a run's early end."""
    newest = newest_whole(folder / "checkpoints")
    if newest is None:
        return f"there is no checkpoint yet in {folder}: --resume auto starts anew"
    return f"--resume auto resumes from {newest}"


def _train(run: Run, objective: Objective) -> None:
    started, config = time.perf_counter(), run.config
    objective = objective.of_run(config.positives, run.same_text)
    loss = objective.loss
    best = BestMetric.resolve(config.best_metric, run.validation if config.eval_every else None)
    report = Reporter(run.folder, run.accelerator, run.steps, run.first_step)
    expected = announce(run, report)
    over = _is_over(run, run.first_step)
    if over and is_finished(run):
        report.say(_nothing_left(run))
        run.accelerator.end_training()
        return
    # The batches are closed whatever happens: at its end the process waits for the data workers, who wait for it.
    data = closing(run.data.steps(run.first_step, run.first_step if over else run.steps))
    stop = StopSignal(run.accelerator.device, partial(_standing, run.folder))
    # The bar is ended before a fault is printed, or both would share a line.
    with device_faults_reported(run.plan.chunk_pairs), closing(report), stop, data as batches:
        step = _loop(run, objective, loss, best, batches, stop, report)
        finish(run, report, expected, step, _is_over(run, step), time.perf_counter() - started)
    if stop.obeyed and step < run.steps:
        raise StoppedEarly(f"by a signal after step {step} of {run.steps}")


def _loop(
    run: Run,
    objective: Objective,
    loss: Loss,
    best: BestMetric,
    batches: Iterator[StepChunks],
    stop: StopSignal,
    report: Reporter,
) -> int:
    """Data to step, and what is due after it; returns the last step that was done."""
    config, step = run.config, run.first_step
    before = BeforeStep.of(run)
    began = time.perf_counter()
    for batch in batches:
        step += 1
        chunks: Chunks = (data := TimedChunks(batch, step))
        if step == run.first_step + 1:
            data.read_one()
            chunks = prepare_first_step(run, objective, data, report) or data
        if config.scale_schedule:
            with run.backend.editing(run.towers.logit_scale):
                run.towers.set_scale_and_bias(scheduled_scale(config.scale_schedule, step, run.steps), None)
        remembered = run.memory.pairs() if run.switch.on else None
        try:
            update = _optimizer_step(run, loss, chunks, remembered, step, before, stop)
        except StepGivenUp:
            step -= 1
            _give_up(run, before, step)
            stop.obeyed = True
            break
        metrics = _remember(run, update, remembered, step, report)
        del update  # its embeddings would stay beside those of the next step
        seconds = time.perf_counter() - began
        report.step(metrics | step_timing(run, seconds, data.seconds))
        if run.validation and _due(step, config.eval_every, run.steps):
            _evaluate(run, loss, best, step, report)
        stopping = _agree(run, stop, step, seconds, report)
        is_best = run.best.get("step") == step
        over = _is_over(run, step)
        if stopping or (config.save_every and (is_best or over or _due(step, config.save_every, run.steps))):
            run.save(step)
        if over:
            if step < run.steps:
                report.say(f"step {step}: {_patience_ended(run)}")
            break
        if stopping:
            stop.obeyed = True
            break
        before = BeforeStep.of(run)
        began = time.perf_counter()
    return step


class TimedChunks:
    """A step's chunks, and the seconds that were spent waiting for them; a fault of the data names the step."""

    def __init__(self, chunks: StepChunks, step: int) -> None:
        self.seconds, self._count, self._step = 0.0, len(chunks), step
        self._chunks, self._read = iter(chunks), list[Chunk]()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Chunk]:
        yield from self._read
        while (chunk := self._next()) is not None:
            yield chunk

    def read_one(self) -> None:
        """Read the first chunk now: data that cannot be read is told before anything is computed."""
        first = self._next()
        self._read = [] if first is None else [first]

    def _next(self) -> Chunk | None:
        began = time.perf_counter()
        try:
            return next(self._chunks, None)
        except InputError as error:
            rank = rank_and_world_size()[0]
            raise RunError(f"step {self._step}, rank {rank}: {error}", of_one_rank=True) from error
        finally:
            self.seconds += time.perf_counter() - began


def _is_over(run: Run, step: int) -> bool:
    return step >= run.steps or run.out_of_patience


def _patience_ended(run: Run) -> str:
    return (
        f"{run.stale} evaluations in a row were not better than {run.best['metric']} {run.best['value']:.4f} of step "
        f"{run.best['step']}, as --patience {run.config.patience} allows: the run ends"
    )


def _nothing_left(run: Run) -> str:
    if run.out_of_patience:
        return f"{_patience_ended(run)}: nothing is left to do; more with a larger --patience"
    return f"the run has its {run.steps} steps: nothing is left to do; more with a larger --steps or --epochs"


def _give_up(run: Run, before: BeforeStep, step: int) -> None:
    """Go back to the end of `step` and save it, unless the checkpoint that stands holds it or nothing was learned."""
    before.restore(run)
    standing = newest_whole(run.checkpoints)
    if step > run.first_step and (standing is None or int(standing.name.removeprefix("step_")) != step):
        run.save(step)


def _optimizer_step(
    run: Run,
    loss: Loss,
    chunks: Chunks,
    remembered: Pairs | None,
    step: int,
    before: BeforeStep,
    stop: StopSignal,
) -> Update:
    """Gradients of the whole batch, clipped; one update of weights and rate, where they are finite."""
    backend = run.backend
    with backend.gradients_of_a_step():
        result = cached_step(
            run.wrapped,
            chunks,
            loss,
            remembered,
            device=run.accelerator.device,
            backward=backend.backward,
            no_sync=backend.no_sync,
            keep_graphs=run.plan.keep_graphs,
            negatives=run.negatives,
            share=run.share_texts,
            between_chunks=stop.look,
            **run.recompute,
        )
    norm = backend.clip_gradients(run.config.grad_clip)
    loss_value, grad_norm = torch.stack([result.loss, norm.to(result.loss)]).tolist()  # the device is waited for here
    lr = max(group["lr"] for group in run.optimizer.param_groups)
    if math.isfinite(loss_value) and math.isfinite(grad_norm):
        run.nonfinite = run.overflows = 0
        backend.step()
        run.schedule.step()
        if run.config.scale_max and not run.config.scale_schedule:
            with backend.editing(run.towers.logit_scale):
                run.towers.clamp_logit_scale(run.config.scale_max)
        if run.average:
            run.average.update_parameters(run.towers)
        return Update(result, loss_value, grad_norm, lr)
    backend.drop_gradients()
    if backend.loss_scale and math.isfinite(loss_value):  # fp16: the next step has a smaller scale; no fault
        run.overflows += 1
        if run.overflows > MOST_OVERFLOWS:
            raise RunError(_diverged(run, step, loss_value, grad_norm))
        return Update(result, loss_value, grad_norm, lr)
    run.nonfinite += 1
    if run.config.on_nonfinite == "stop" or run.nonfinite > run.config.nonfinite_limit:
        raise RunError(_diverged(run, step, loss_value, grad_norm))
    before.restore_statistics()
    return Update(result, loss_value, grad_norm, lr, applied=False)


def _remember(run: Run, update: Update, remembered: Pairs | None, step: int, report: Reporter) -> dict:
    """Put this step's embeddings into the memory, switch it on when due, and return the step's metrics."""
    memory, was_full = run.memory, len(run.memory) == run.memory.size
    drift = None
    if memory.size and update.applied:
        drift = memory.drift(update.result.fresh)
        memory.enqueue(update.result.fresh, step)
    metrics = step_metrics(run, step, update, drift, remembered)
    if drift is not None:
        before = run.switch.on
        run.switch.update(
            step, Drift(metrics["drift_image"], metrics["drift_text"], metrics["drift_samples"]), was_full
        )
        if run.switch.on and not before:
            report.say(f"step {step + 1}: the memory is used from here on")
    return metrics


def _evaluate(run: Run, loss: Loss, best: BestMetric, step: int, report: Reporter) -> None:
    """Measure on validation data, on all ranks; note whether it is the best so far."""
    assert run.validation is not None
    with run.backend.autocast():
        metrics = validate(
            run.evaluated,
            run.validation,
            run.processing,
            partial(_validation_loss, run.evaluated, loss),
            device=run.accelerator.device,
            batch_size=min(256, run.plan.chunk_pairs * 2),
            workers=run.loading.workers,
        )
    report.evaluation(step, metrics)
    value = best.value(metrics)
    if best.better(value, run.best.get("value")):
        run.best, run.stale = {"step": step, "metric": best.name, "value": value}, 0
    else:
        run.stale += 1


@torch.no_grad()
def _validation_loss(
    towers: TwoTowers, loss: Loss, image_embeds: Tensor, text_embeds: Tensor, group: Tensor, text_id: Tensor
) -> float:
    """The loss of these pairs as one batch, without memory; every rank takes its share of the rows."""
    count = len(group)
    pairs = Pairs(image_embeds, text_embeds, group, torch.arange(count, device=group.device), text_id)
    rank, world_size = rank_and_world_size()
    rows = slice(rank * count // world_size, (rank + 1) * count // world_size)
    # Losses are float32, whatever the towers' precision.
    with torch.autocast(group.device.type, enabled=False), full_float32():
        share = loss(pairs, None, towers.logit_scale.exp(), towers.logit_bias, rows)
    return sum_over_ranks(share.loss.clone()).item()


def _agree(run: Run, stop: StopSignal, step: int, seconds: float, report: Reporter) -> bool:
    """One small reduction over the ranks: was any told to stop, and which pairs could none of them read?

    Too many unreadable pairs end the run here.
    """
    counts, new_skips = run.data.counts, run.data.new_skips()
    found_early = len(run.source.skipped) if run.accelerator.is_main_process else 0
    bad, read = sum(counts.skipped.values()) - found_early, counts.read - found_early
    numbers = [int(stop.received), len(new_skips), bad, read, round(1000 * seconds)]
    told, fresh_skips, bad, read, milliseconds = sum_counts(numbers, run.accelerator.device)
    stop.pace(milliseconds / 1000 / run.plan.world_size, 2 * run.plan.chunks - run.plan.keep_graphs)
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


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _diverged(run: Run, step: int, loss: float, grad_norm: float) -> str:
    """What to say about a loss or gradient that is not a number."""
    times = f" in {run.nonfinite} steps in a row" if run.nonfinite > 1 else ""
    return (
        f"step {step}: loss {loss}, gradient norm {grad_norm}{times}: training diverged. Lower --lr, lengthen "
        "--warmup-steps or lower --grad-clip"
    )
