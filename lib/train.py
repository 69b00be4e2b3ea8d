"""The training loop: data to step, and what is due after a step."""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor

from lib import backends
from lib.backends.device import device_faults_reported
from lib.backends.precision import full_float32
from lib.config import TrainConfig
from lib.data import Chunk, StepChunks
from lib.distributed import gather_objects, rank_and_world_size, sum_counts, sum_over_ranks
from lib.errors import InputError, RunError, StoppedEarly, machine_errors_reported
from lib.evaluation.validation import BestMetric, validate
from lib.finish import finish, is_finished
from lib.gradcache.step import Chunks, StepResult, cached_step
from lib.losses import Loss, Pairs
from lib.losses.objective import Objective
from lib.losses.xbm import Drift
from lib.runs.checkpoint import resume_hint
from lib.runs.curve import loss_figures
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


def train(config: TrainConfig, objective: Objective) -> None:
    """Train as `config` says, from the first batch or a checkpoint to the export; files as the README lists them."""
    if config.data_info:
        show_data(config)
        return
    backend = backends.start(config.tracker, config.precision, config.deterministic)
    with (
        claimed_folder(config, objective.family) as folder,
        Watchdog(),
        machine_errors_reported(partial(resume_hint, folder)),
    ):
        _train(make_run(config, objective, backend, folder), objective)


def _train(run: Run, objective: Objective) -> None:
    started, config, progress = time.perf_counter(), run.config, run.progress
    objective = objective.of_run(config.positives, run.same_text)
    best = BestMetric.resolve(config.best_metric, run.data.validation if config.eval_every else None)
    report = Reporter(run.folder, run.accelerator, progress.steps, progress.first_step)
    expected = announce(run, report)
    over = progress.is_over(progress.first_step)
    if over and is_finished(run):
        report.say(progress.nothing_left())
        run.accelerator.end_training()
        return
    # The batches are closed whatever happens: at its end the process waits for the data workers, who wait for it.
    data = closing(run.data.training.steps(progress.first_step, progress.first_step if over else progress.steps))
    stop = StopSignal(run.accelerator.device, partial(resume_hint, run.folder))
    # The bar is ended before a fault is printed, or both would share a line.
    with device_faults_reported(run.step.plan.chunk_pairs), closing(report), stop, data as batches:
        step = _loop(run, objective, best, batches, stop, report)
        finish(run, report, expected, step, progress.is_over(step), time.perf_counter() - started)
    if stop.obeyed and step < progress.steps:
        raise StoppedEarly(f"by a signal after step {step} of {progress.steps}")


def _loop(
    run: Run, objective: Objective, best: BestMetric, batches: Iterator[StepChunks], stop: StopSignal, report: Reporter
) -> int:
    """Data to step, and what is due after it; returns the last step that was done."""
    step, loss, memory = run.progress.first_step, objective.loss, run.step.memory
    before, began = BeforeStep.of(run), time.perf_counter()
    for batch in batches:
        step += 1
        chunks: Chunks = (data := TimedChunks(batch, step))
        if step == run.progress.first_step + 1:
            data.read_first()
            chunks = prepare_first_step(run, objective, data, report)
        run.set_scheduled_scale(step)
        if step == 1:
            run.save_initial()  # after everything that changes weights before the first step
        remembered = memory.pairs() if run.step.switch.on else None
        try:
            with run.backend.gradients_of_a_step():
                result = cached_step(run.step.cache, chunks, loss, remembered, between_chunks=stop.look)
        except StepGivenUp:
            step -= 1
            before.restore(run)
            run.save_unless_saved(step)
            stop.obeyed = True
            break
        update = _update(run, result, before, step)
        metrics = _remember(run, update, remembered, step, report)
        del result, update  # their embeddings would stay in memory next to those of the next step
        seconds = time.perf_counter() - began
        report.step(metrics | step_timing(run, seconds, data.seconds))
        if _after_step(run, loss, best, step, seconds, stop, report):
            break
        before, began = BeforeStep.of(run), time.perf_counter()
    return step


class TimedChunks(StepChunks):
    """A step's chunks, and the seconds spent waiting for them; a fault of the data names the step."""

    def __init__(self, chunks: StepChunks, step: int) -> None:
        super().__init__(len(chunks), self._timed(iter(chunks), step), chunks.ready)
        self.seconds = 0.0

    def read_first(self) -> None:
        """Read the first chunk now: data that cannot be read is an error before anything is computed."""
        self._chunks = chain(list(islice(self._chunks, 1)), self._chunks)

    def _timed(self, chunks: Iterator[Chunk], step: int) -> Iterator[Chunk]:
        while True:
            began = time.perf_counter()
            try:
                chunk = next(chunks, None)
            except InputError as error:
                rank = rank_and_world_size()[0]
                raise RunError(f"step {step}, rank {rank}: {error}", of_one_rank=True) from error
            finally:
                self.seconds += time.perf_counter() - began
            if chunk is None:
                return
            yield chunk


def _update(run: Run, result: StepResult, before: BeforeStep, step: int) -> Update:
    """Clip the gradients of the whole batch; update weights and rate once, where loss and gradients are finite."""
    backend, model, config, progress = run.backend, run.model, run.config, run.progress
    norm = backend.clip_gradients(config.grad_clip)
    loss, grad_norm = torch.stack([result.loss, norm.to(result.loss)]).tolist()  # the device is waited for here
    lr = max(group["lr"] for group in model.optimizer.param_groups)
    if math.isfinite(loss) and math.isfinite(grad_norm):
        progress.nonfinite = progress.overflows = 0
        backend.step()
        model.schedule.step()
        if config.scale_max and not config.scale_schedule:
            with backend.editing(model.towers.logit_scale):
                model.towers.clamp_logit_scale(config.scale_max)
        if model.average:
            model.average.update_parameters(model.towers)
        return Update(result, loss, grad_norm, lr)
    backend.drop_gradients()
    if backend.loss_scale and math.isfinite(loss):  # fp16 overflow, no fault: the next step has a smaller loss scale
        progress.count_overflow(step, loss, grad_norm)
        return Update(result, loss, grad_norm, lr)
    progress.count_nonfinite(step, loss, grad_norm, config.on_nonfinite == "skip")
    before.restore_statistics()
    return Update(result, loss, grad_norm, lr, applied=False)


def _remember(run: Run, update: Update, remembered: Pairs | None, step: int, report: Reporter) -> dict:
    """Put this step's embeddings into the memory, switch it on when due, and return the step's metrics."""
    memory, switch = run.step.memory, run.step.switch
    was_full, drift = len(memory) == memory.size, None
    if memory.size and update.applied:
        drift = memory.drift(update.result.fresh)
        memory.enqueue(update.result.fresh, step)
    metrics = step_metrics(run, step, update, drift, remembered)
    if drift is not None:
        before = switch.on
        switch.update(step, Drift(metrics["drift_image"], metrics["drift_text"], metrics["drift_samples"]), was_full)
        if switch.on and not before:
            report.say(f"step {step + 1}: the memory is used from here on")
    return metrics


def _after_step(
    run: Run, loss: Loss, best: BestMetric, step: int, seconds: float, stop: StopSignal, report: Reporter
) -> bool:
    """Evaluate and save when due; True if the run ends here."""
    config, progress = run.config, run.progress
    due = lambda every: every > 0 and (step % every == 0 or step == progress.steps)  # noqa: E731
    if run.data.validation and due(config.eval_every):
        _evaluate(run, loss, best, step, report)
    stopping = _agree(run, stop, step, seconds, report)
    over, is_best = progress.is_over(step), progress.best.get("step") == step
    if stopping or (config.save_every and (is_best or over or due(config.save_every))):
        run.save(step)
    if over and step < progress.steps:
        report.say(f"step {step}: {progress.patience_ended()}")
    stop.obeyed = stopping and not over
    return over or stopping


def _evaluate(run: Run, loss: Loss, best: BestMetric, step: int, report: Reporter) -> None:
    """Measure on validation data, on all ranks; note whether it is the best so far, unless it is a test split."""
    towers, progress = run.model.evaluated, run.progress
    assert run.data.validation is not None
    with run.backend.autocast():
        metrics = validate(
            towers,
            run.data.validation,
            run.model.processing,
            partial(_validation_loss, towers, loss, run.family),
            device=run.accelerator.device,
            batch_size=min(256, run.step.plan.chunk_pairs * 2),
            workers=run.data.loading.workers,
        )
    report.evaluation(step, metrics)
    if run.data.validation.chooses:
        better = best.better(metrics, progress.best)
        progress.note_evaluation(step, best.name, best.value(metrics), metrics["loss"], better)


@torch.no_grad()
def _validation_loss(
    towers: TwoTowers,
    loss: Loss,
    family: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    group: Tensor,
    text_id: Tensor,
) -> dict[str, float]:
    """The loss of these pairs as one batch, without memory; every rank takes its share of the rows."""
    count = len(group)
    pairs = Pairs(image_embeds, text_embeds, group, torch.arange(count, device=group.device), text_id)
    rank, world_size = rank_and_world_size()
    rows = slice(rank * count // world_size, (rank + 1) * count // world_size)
    # Losses are float32, whatever the towers' precision.
    with torch.autocast(group.device.type, enabled=False), full_float32():
        share = loss(pairs, None, towers.logit_scale.exp(), towers.logit_bias, rows)
    return loss_figures(family, sum_over_ranks(share.loss.clone()).item(), count)


def _agree(run: Run, stop: StopSignal, step: int, seconds: float, report: Reporter) -> bool:
    """Agree on stopping in one small reduction over the ranks, which also counts the pairs that could not be read.

    Raises RunError for too many unreadable pairs.
    """
    data, plan = run.data, run.step.plan
    counts, new_skips = data.training.counts, data.training.new_skips()
    found_early = len(data.source.skipped) if run.accelerator.is_main_process else 0
    bad, read = sum(counts.skipped.values()) - found_early, counts.read - found_early
    numbers = [int(stop.received), len(new_skips), bad, read, round(1000 * seconds)]
    signalled, fresh_skips, bad, read, milliseconds = sum_counts(numbers, run.accelerator.device)
    stop.pace(milliseconds / 1000 / plan.world_size, 2 * plan.chunks - plan.keep_graphs)
    if fresh_skips:
        report.skipped(step, [skip for of_rank in gather_objects(new_skips) for skip in of_rank])
    total = data.source.size or max(read, 100)
    if bad > run.config.max_bad * total:
        reasons = ", ".join(f"{reason} {count}" for reason, count in all_counts(run)["skipped"].items())
        raise RunError(
            f"{bad} of {total} pairs cannot be read ({reasons}), more than --max-bad {run.config.max_bad}; they are "
            f"listed in {run.folder / SKIPPED}: mend them or raise --max-bad"
        )
    return signalled > 0
