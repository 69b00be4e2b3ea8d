"""What a run says of itself: the start-up plan, a line per step, and the counts of its data."""

import dataclasses
import os
import shlex
import sys

from lib.backends import peak_memory_bytes
from lib.checkpoint import is_whole, merge_counts
from lib.collectives import gather_objects
from lib.config import changed_settings, save_config
from lib.data import Prepare
from lib.data.sources import split_weight
from lib.evaluation.embed import counted
from lib.losses import Pairs
from lib.plan import oversize_warning, useless_memory_warning
from lib.report import CONFIG, Reporter
from lib.run import Run, Update
from lib.trainable import trained_share
from lib.trunk_options import keeping_activations
from lib.xbm import Drift


def announce(run: Run, report: Reporter) -> None:
    """The start-up plan, and the settings as a file."""
    config, towers = run.config, run.towers
    trained, total = trained_share(towers)
    name = f"{config.image_tower} and {config.text_tower}" if config.image_tower else config.model
    report.say(
        f"model      {name}: {total:,} parameters, {trained:,} train; {towers.embed_dim} dimensions, "
        f"{towers.image_size} px",
        *_rate_lines(run),
        f"data       {run.source.description}",
        *_text_lines(run),
        *_validation_lines(run),
        *_stored_lines(run.prepare),
        *run.plan.lines(),
        *_steps_lines(run),
        f"run        {run.folder}",
    )
    for warning in (
        oversize_warning(config.effective_batch, config.xbm_size, run.source.size),
        useless_memory_warning(config.effective_batch, config.xbm_size, run.source.size),
        f"--lr {config.lr:g} is high for pretrained weights; 1e-5 is usual"
        if run.pretrained and config.lr > 2e-4 and not config.lora
        else None,
        *(
            f"--gradient-checkpointing: the {tower} tower does not offer it and keeps its activations"
            for tower in (keeping_activations(towers) if config.gradient_checkpointing else ())
        ),
        "no validation data: --hold-out 0.1 keeps a tenth of the images for it, --val-data names other data"
        if config.eval_every and not run.validation
        else None,
        f"left out: {counted(reason for _, reason in run.source.skipped)}" if run.source.skipped else None,
        f"left out of the validation data: {counted(reason for _, reason in run.validation.skipped)}"
        if run.validation and run.validation.skipped
        else None,
        "there is one class alone: with --positives group all pairs are positives of each other"
        if run.source.classes and len(run.source.classes) == 1 and config.positives == "group"
        else None,
        *(
            f"{folder} is not a whole checkpoint, cut short while it was written or removed: it is passed over"
            for folder in sorted(run.checkpoints.glob("step_*"))
            if not is_whole(folder)
        ),
    ):
        if warning:
            report.say(f"warning: {warning}")
    if run.accelerator.is_main_process:
        save_config(config, run.folder / CONFIG)
    if config.tracker != "none":
        run.accelerator.project_configuration.logging_dir = str(run.folder)
        flat = {n: v for n, v in dataclasses.asdict(config).items() if isinstance(v, int | float | str)}
        run.accelerator.init_trackers("image-text", config=flat)


def next_command(run: Run) -> str:
    """What evaluates the run's model on what it did not train on."""
    config, task = run.config, "zeroshot" if run.source.classes else "retrieval"
    flags = {
        "--model": str(run.folder),
        "--data": config.val_data or split_weight(config.data[0])[0],
        "--hold-out": f"{config.hold_out:g}" if config.hold_out and not config.val_data else None,
        "--prompts": config.prompts if run.source.classes else None,
        "--image-root": config.image_root,
        "--output-dir": str(run.folder / task),
    }
    here = sys.executable.removeprefix(f"{os.getcwd()}/")
    python = "python" if os.path.isabs(here) else here
    words = [word for name, value in flags.items() if value for word in (name, value)]
    return shlex.join([python, "evaluate.py", task, *words])


def _steps_lines(run: Run) -> list[str]:
    """How far the run goes; of one that goes on, from where, and which settings are not those it had."""
    if not run.first_step:
        return [f"steps      {run.steps:,}"]
    changed = changed_settings(run.config, run.folder / CONFIG)
    return [
        f"steps      {run.steps:,} (from {run.first_step:,})",
        *([f"changed    {', '.join(changed)}"] if changed else []),
    ]


def _text_lines(run: Run) -> list[str]:
    """How many texts are different: with class prompts, far fewer than there are pairs."""
    distinct, batch = run.source.distinct_texts, run.plan.effective_batch
    once = ""
    if distinct is not None and distinct < batch and run.config.shared_texts == "auto":
        once = "; each is encoded once a step" if run.share_texts else ": each pair's is encoded, as dropout is its own"
    known = [] if distinct is None else [f"texts      {distinct:,} distinct texts{once}"]
    count = sum(len(next(iter(chunk.values()))) for chunk in run.negatives)
    return known + ([f"           {count:,} negative prompts more, candidates of every image"] if count else [])


def _validation_lines(run: Run) -> list[str]:
    """What the run is validated on, and how often."""
    data, every = run.validation, run.config.eval_every
    if data is None or not every:
        return []
    texts = f"{len(data.classes)} classes" if data.classes else f"{len(data.captions or ()):,} captions"
    return [f"validation {len(data):,} images, {texts}, every {every:,} steps and at the end"]


def _rate_lines(run: Run) -> list[str]:
    """The peak rates, where parts have their own."""
    rates = [group["initial_lr"] for group in run.optimizer.param_groups]
    if min(rates) == max(rates):
        return []
    return [f"rates      {len(set(rates))} peak learning rates, {min(rates):.3g} to {max(rates):.3g}"]


def _stored_lines(prepare: Prepare) -> list[str]:
    """What frozen trunks gave, where it is stored."""
    lines = []
    for tower, outputs in (("image", prepare.image_outputs), ("text", prepare.text_outputs)):
        if outputs is not None:
            bad = f", {len(outputs.unreadable):,} could not be read" if outputs.unreadable else ""
            lines.append(f"stored     {len(outputs):,} outputs of the {tower} trunk in {outputs.folder}{bad}")
    return lines


def step_metrics(run: Run, step: int, update: Update, seconds: float, data_seconds: float) -> dict:
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
        **({} if update.applied else {"skipped": "not finite"}),
        "pairs_per_second": run.plan.effective_batch / seconds,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
        "replay_difference": update.result.replay_difference.item(),
    }


def memory_metrics(run: Run, step: int, remembered: Pairs | None, drift: Drift) -> dict:
    return {
        "xbm_used": 0 if remembered is None else len(remembered),
        "xbm_filled": len(run.memory),
        "xbm_age": run.memory.mean_age(step),
        "drift_image": drift.image,
        "drift_text": drift.text,
        "drift_samples": drift.samples,
    }


def all_counts(run: Run) -> dict:
    """Pairs read, used and skipped in the first pass over the data, over all ranks."""
    return merge_counts(gather_objects(dataclasses.asdict(run.data.counts)))
