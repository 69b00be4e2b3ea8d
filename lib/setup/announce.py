"""Lines that a run prints: the start-up plan with its warnings, metrics of a step, and counts of the data."""

import dataclasses
import os
import shlex
import sys

import psutil
import torch
from torch import Tensor

from lib.backends import Backend, peak_memory_bytes
from lib.backends.device import peak_reserved_bytes
from lib.config import TrainConfig, changed_settings, save_config
from lib.data import Prepare
from lib.data.loading import bytes_in_flight
from lib.data.pairs import same_group_share
from lib.data.sources import split_weight
from lib.distributed import gather_objects
from lib.evaluation.embed import counted
from lib.files import without_secrets
from lib.gradcache.distinct_texts import text_count
from lib.losses import Pairs
from lib.losses.xbm import no_drift
from lib.runs.checkpoint import merge_counts
from lib.runs.curve import loss_figures
from lib.runs.reporter import CONFIG, Reporter
from lib.setup.plan import gigabytes, oversize_warning, useless_memory_warning
from lib.setup.run import Run, Update
from lib.towers.trainable import trained_share
from lib.towers.trunk_options import keeping_activations

WORKER_BYTES = 50 * 2**20  # that a data worker holds alone, beside what it shares with the process it was forked from


def announce(run: Run, report: Reporter) -> dict[str, int]:
    """The start-up plan, and the settings as a file; returns `expected_memory`."""
    config, towers, expected = run.config, run.model.towers, expected_memory(run)
    trained, total = trained_share(towers)
    name = f"{config.image_tower} and {config.text_tower}" if config.image_tower else config.model
    report.say(
        f"model      {name}: {total:,} parameters, {trained:,} train; {towers.embed_dim} dimensions, "
        f"{towers.image_size} px",
        *_rate_lines(run),
        f"data       {run.data.source.description}",
        *(f"{'chosen' if number == 0 else '':<11}{choice}" for number, choice in enumerate(run.choices)),
        *_text_lines(run),
        *_validation_lines(run),
        *_stored_lines(run.data.prepare),
        *run.step.plan.lines(_positives(run)),
        *_host_lines(run, expected["host_memory_bytes"]),
        f"precision  {run.backend.precision}",
        *compile_lines(config, run.backend),
        *_steps_lines(run),
        f"run        {run.folder}",
    )
    known_faults = run.data.source.skipped + run.data.source.unusable
    for warning in (
        oversize_warning(config.effective_batch, config.xbm_size, run.data.source.size),
        useless_memory_warning(config.effective_batch, config.xbm_size, run.data.source.size),
        f"--lr {config.lr:g} is high for pretrained weights; 1e-5 is usual"
        if run.model.pretrained and config.lr > 2e-4 and not config.lora
        else None,
        *(
            f"--gradient-checkpointing: the {tower} tower does not offer it and keeps its activations"
            for tower in (keeping_activations(towers) if config.gradient_checkpointing else ())
        ),
        "no validation data: --hold-out 0.1 keeps a tenth of the images for it, --val-data names other data"
        if config.eval_every and not run.data.validation
        else None,
        run.data.loading.warning,
        _cut_texts_warning(run),
        f"skipped: {counted(reason for _, reason in known_faults)}" if known_faults else None,
        f"skipped in the validation data: {counted(reason for _, reason in run.data.validation.skipped)}"
        if run.data.validation and run.data.validation.skipped
        else None,
        "the data has one class: with --positives group all pairs are positives of each other"
        if run.data.source.classes and len(run.data.source.classes) == 1 and config.positives == "group"
        else None,
        *run.warnings,
    ):
        if warning:
            report.say(f"warning: {warning}")
    if run.accelerator.is_main_process:
        save_config(config, run.folder / CONFIG)
    if config.tracker != "none":
        run.accelerator.project_configuration.logging_dir = str(run.folder)
        flat = {n: v for n, v in dataclasses.asdict(config).items() if isinstance(v, int | float | str)}
        flat = {n: without_secrets(v) if isinstance(v, str) else v for n, v in flat.items()}
        run.accelerator.init_trackers("image-text", config=flat)
    return expected


def expected_memory(run: Run) -> dict[str, int]:
    """Predicted peaks of one rank: on the accelerator, and of what the process holds in the machine's memory."""
    plan, device = run.step.plan, run.accelerator.device
    host = psutil.Process().memory_info().rss + plan.pixel_bytes
    if device.type == "cpu":
        host += plan.device_bytes - sum(parameter.nbytes for parameter in run.model.towers.parameters())
    return {"peak_memory_bytes": host if device.type == "cpu" else plan.device_bytes, "host_memory_bytes": host}


def compared(run: Run, expected: dict[str, int]) -> dict[str, dict[str, float]]:
    """{name: {"predicted", "measured", "off"}}, off being measured / predicted - 1; the highest of all ranks."""
    devices = {"peak_memory_bytes": run.accelerator.device, "host_memory_bytes": torch.device("cpu")}
    measured = {name: max(gather_objects(peak_memory_bytes(device))) for name, device in devices.items()}
    return {
        name: {"predicted": expected[name], "measured": value, "off": value / expected[name] - 1}
        for name, value in measured.items()
    }


def _host_lines(run: Run, host_bytes: int) -> list[str]:
    """The host's memory, and which processes decode."""
    plan, loading = run.step.plan, run.data.loading
    ahead = f" and {plan.chunks_ahead:,} read ahead" if plan.chunks_ahead else ""
    images = f"{gigabytes(plan.pixel_bytes)} of images ({plan.chunks:,} chunks of a step{ahead})"
    if not loading.workers:
        return [f"host       about {gigabytes(host_bytes)} for each rank, {images} included"]
    in_flight = bytes_in_flight(loading.workers, loading.part_size, plan.image_bytes)
    of_workers = loading.workers * WORKER_BYTES + in_flight
    decode = "1 worker process decodes" if loading.workers == 1 else f"{loading.workers} worker processes decode"
    return [
        f"host       about {gigabytes(host_bytes + of_workers)} for each rank, {images} included; {decode} in "
        f"{gigabytes(of_workers)} of it"
    ]


def next_command(run: Run) -> str:
    """The command that evaluates the run's model on data that it did not train on."""
    config, task = run.config, "zeroshot" if run.data.source.classes else "retrieval"
    flags = {
        "--model": str(run.folder),
        "--data": split_weight(config.data[0])[0] if config.hold_out or not config.val_data else config.val_data,
        "--hold-out": f"{config.hold_out:g}" if config.hold_out else None,
        "--prompts": config.prompts if run.data.source.classes else None,
        "--class-names": str(config.class_names) if config.class_names else None,
        "--captions": config.captions if config.captions == "lines" else None,
        "--image-root": config.image_root,
        "--image-column": config.image_column,
        "--caption-column": config.caption_column,
        "--output-dir": str(run.folder / task),
    }
    here = sys.executable.removeprefix(f"{os.getcwd()}/")
    python = "python" if os.path.isabs(here) else here
    words = [word for name, value in flags.items() if value for word in (name, value)]
    return shlex.join([python, "evaluate.py", task, *words])


def _steps_lines(run: Run) -> list[str]:
    """Number of steps; for a resumed run also its first step and the settings that changed."""
    if not run.progress.first_step:
        return [f"steps      {run.progress.steps:,}"]
    changed = changed_settings(run.config, run.folder / CONFIG)
    return [
        f"steps      {run.progress.steps:,} (from {run.progress.first_step:,})",
        *([f"changed    {', '.join(changed)}"] if changed else []),
    ]


def compile_lines(config: TrainConfig, backend: Backend) -> list[str]:
    """Compilation of the trunks, or the hint that it would be faster."""
    if config.compile:
        return ["compile    both trunks, in the first step: it takes minutes longer"]
    if backend.accelerator.device.type == "cpu" or backend.shards_weights:
        return []
    return ["compile    no: --compile makes steps faster once the first has compiled the trunks, for a minute or two"]


def _text_lines(run: Run) -> list[str]:
    """Numbers of distinct texts and of captions that several images share; class prompts are few and often repeated."""
    distinct, batch = run.data.source.distinct_texts, run.step.plan.effective_batch
    once = ""
    if distinct is not None and distinct < batch:
        once = (
            "; each is encoded once a step"
            if run.step.cache.share_texts
            else "; encoded once per pair, because the text tower uses dropout"
        )
    shared, same = run.data.source.shared_text_pairs, ""
    if shared:
        count_as = {"exclude": "no negatives", "positive": "positives", "negative": "negatives"}[run.same_text]
        same = (
            f"; {shared:,} captions are identical to a caption of another image: {count_as} of each other (--same-text)"
        )
    known = [] if distinct is None else [f"texts      {distinct:,} distinct texts{once}{same}"]
    count = _negative_prompts(run)
    return known + ([f"           {count:,} negative prompts more, candidates of every image"] if count else [])


def _positives(run: Run) -> str:
    """Expected number of positives among an anchor's candidates; nothing where groups are unknown or do not count."""
    share, plan = same_group_share(run.data.source), run.step.plan
    count = round((share or 0) * (plan.effective_batch + plan.xbm_size))
    if run.config.positives == "pair" or count < 2:
        return ""
    group = "class" if run.data.source.classes else "image"
    return f"; about {count:,} of the candidates are positives (same {group})"


def _negative_prompts(run: Run) -> int:
    """Texts that are negatives of every image."""
    return sum(map(text_count, run.step.cache.negatives))


def _cut_texts_warning(run: Run) -> str | None:
    """The number of texts that are longer than the model's context; None without any."""
    found, texts = run.data.text_lengths, "prompts" if run.data.source.templates else "captions"
    if not found or not found.cut:
        return None
    return (
        f"{found.cut:,} of {found.looked_at:,} {texts} are longer than the model's {found.token_limit} tokens and "
        "are cut there"
    )


def _validation_lines(run: Run) -> list[str]:
    """Validation data, the steps between evaluations, and whether they choose the checkpoint."""
    data, every, hold_out = run.data.validation, run.config.eval_every, run.config.hold_out
    if data is None or not every:
        return []
    texts = f"{len(data.classes)} classes" if data.classes else f"{len(data.captions or ()):,} captions"
    lines = [f"validation {len(data):,} images, {texts}, every {every:,} steps and at the end"]
    if not data.chooses:
        lines.append("           a test split: its figures choose no checkpoint, and the last weights are exported")
    if hold_out:
        half = "half of the held-out images" + (" is not used here" if run.config.val_data else "")
        lines.append(f"           {half}; evaluate.py --hold-out {hold_out:g} reports on the other half")
    return lines


def _rate_lines(run: Run) -> list[str]:
    """The peak rates, where parts have their own."""
    rates = [group["initial_lr"] for group in run.model.optimizer.param_groups]
    if min(rates) == max(rates):
        return []
    return [f"rates      {len(set(rates))} peak learning rates, {min(rates):.3g} to {max(rates):.3g}"]


def _stored_lines(prepare: Prepare) -> list[str]:
    """Stored outputs of frozen trunks."""
    lines = []
    for tower, outputs in (("image", prepare.image_outputs), ("text", prepare.text_outputs)):
        if outputs is not None:
            bad = f", {len(outputs.unreadable):,} could not be read" if outputs.unreadable else ""
            lines.append(f"stored     {len(outputs):,} outputs of the {tower} trunk in {outputs.folder}{bad}")
    return lines


def step_metrics(run: Run, step: int, update: Update, drift: Tensor | None, remembered: Pairs | None) -> dict:
    """A line of metrics.jsonl, but for its times; `drift` is what `CrossBatchMemory.drift` gave.

    All numbers of the device are read together: each reading waits for it.
    """
    on_device = {
        "logit_scale": run.model.towers.logit_scale.detach().exp(),
        "logit_bias": run.model.towers.logit_bias.detach(),
        "replay_difference": update.result.replay_difference,
    }
    if run.step.memory.size:
        on_device["xbm_age"] = run.step.memory.mean_age(step)
        names = "drift_image", "drift_text", "drift_samples"
        on_device |= zip(names, no_drift(update.result.loss.device) if drift is None else drift, strict=True)
    numbers = dict(zip(on_device, torch.stack([value.float() for value in on_device.values()]).tolist(), strict=True))
    metrics = {
        "step": step,
        "epoch": step * run.step.plan.effective_batch / run.data.source.size if run.data.source.size else None,
        **loss_figures(
            run.family,
            update.loss,
            run.step.plan.effective_batch,
            0 if remembered is None else len(remembered),
            _negative_prompts(run),
        ),
        "lr": update.lr,
        "grad_norm": update.grad_norm,
        **numbers,
        **({} if update.applied else {"skipped": "not finite"}),
        "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
    }
    if (reserved := peak_reserved_bytes(run.accelerator.device)) is not None:
        metrics["peak_reserved_bytes"] = reserved
    if run.step.memory.size:
        metrics["xbm_used"] = 0 if remembered is None else len(remembered)
        metrics["xbm_filled"] = len(run.step.memory)
        metrics["drift_samples"] = int(numbers["drift_samples"])
    return metrics


def step_timing(run: Run, seconds: float, data_seconds: float) -> dict:
    """The times of a line of metrics.jsonl; data_seconds: waiting for chunks, a part of `seconds`."""
    return {
        "pairs_per_second": run.step.plan.effective_batch / seconds,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
    }


def all_counts(run: Run) -> dict:
    """Pairs read, used and skipped in the first pass over the data, over all ranks."""
    return merge_counts(gather_objects(dataclasses.asdict(run.data.training.counts)))


def counts_at_the_end(run: Run) -> dict:
    """The same, with the pairs of shards that were read and whose turn did not come before the run ended."""
    counts, waiting = all_counts(run), sum(gather_objects(run.data.training.waiting))
    if waiting:
        counts["read"] += waiting
        counts["skipped"]["not_reached"] = waiting
    return counts
