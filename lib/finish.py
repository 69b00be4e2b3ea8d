"""After the last step: loss curve, summary, and the checked export of the best model."""

import copy
import dataclasses

from lib.backends import peak_memory_bytes
from lib.data import IndexedSource
from lib.data.durable import find_damage, read_manifest
from lib.distributed import decided_by_rank_0, gather_objects
from lib.export import export, noise_and_texts
from lib.export.card import model_card
from lib.export.checked import RECORD
from lib.export.hugging_face import HUGGING_FACE
from lib.runs.checkpoint import MANIFEST
from lib.runs.curve import find_parting, parting_words
from lib.runs.reporter import Reporter, read_metrics, read_summary
from lib.setup.announce import compared, counts_at_the_end, next_command
from lib.setup.run import Run
from lib.towers import TwoTowers
from lib.towers.lora import merge

EXPORT = "export"
"""Folder in that of the run."""


def is_finished(run: Run) -> bool:
    """True if the export of the best (or last) step is whole, and the summary that is written after it is there."""

    def decide() -> bool:
        record = read_manifest(run.folder / EXPORT, RECORD) or {}
        summary = read_summary(run.folder)
        exported = record.get("step") == exported_step(run, run.progress.first_step)
        return exported and summary.get("steps") == run.progress.first_step and "export_difference" in summary

    return decided_by_rank_0(decide)


def exported_step(run: Run, last: int) -> int:
    """The step whose model is exported: the best whose checkpoint was kept, else the last."""
    return run.progress.best["step"] if run.best_checkpoint else last


def finish(run: Run, report: Reporter, expected: dict[str, int], step: int, complete: bool, seconds: float) -> None:
    """Write curve and summary, and export the best checkpoint of a complete run.

    expected: predicted peaks of memory.
    """
    parting = find_parting(read_metrics(run.folder)) if run.accelerator.is_main_process else None
    summary: dict = {
        "steps": step,
        "pairs": step * run.step.plan.effective_batch,
        "wall_seconds": seconds,
        "peak_memory_bytes": max(gather_objects(peak_memory_bytes(run.accelerator.device))),
        "prediction": compared(run, expected),
        "eval": report.last_evaluation,
        "best": run.progress.best,
        "stopped_early": complete and step < run.progress.steps,
        "parting": parting,
        "data": counts_at_the_end(run)
        | ({"images": len(run.data.source.images)} if isinstance(run.data.source, IndexedSource) else {}),
        "texts": {"same_text": run.same_text, "shared_pairs": run.data.source.shared_text_pairs}
        | (dataclasses.asdict(run.data.text_lengths) if run.data.text_lengths else {}),
    }
    if parting:
        report.say(f"warning: {parting_words(parting)}")
    if run.step.memory.size and not run.step.switch.on and complete:
        report.say(
            "warning: the memory was never used: warm-up lasted, or remembered embeddings kept drifting (drift_image "
            "and drift_text in metrics.jsonl); --xbm-start STEP uses it from a step on, --xbm-size 0 saves its room"
        )
    report.curve()
    report.summary(summary)
    last = run.whole_towers() if complete else None  # of all ranks, where each holds a part
    if last is not None and run.accelerator.is_main_process:
        report.summary(summary | {"export_difference": _export(run, last, step, report)})
        report.say(f"next: {next_command(run)}")
    report.close()
    run.accelerator.wait_for_everyone()  # rank 0 exports alone: the others must not end the group before it has
    run.accelerator.end_training()


def _export(run: Run, last: TwoTowers, step: int, report: Reporter) -> float:
    """Write the best model (the last one without evaluations) in the Hugging Face layout, and check it."""
    # Mixed precision is an instance's own `forward`; the check compares with a plain float32 model.
    vars(last).pop("forward", None)
    folder, at, best = run.folder / EXPORT, exported_step(run, step), run.best_checkpoint
    if best and (damaged := find_damage(best, MANIFEST)):
        report.say(f"warning: {best} is damaged ({damaged}): the model of step {step} is exported instead")
        at, best = step, None
    report.say(f"exporting the model of step {at}, and loading it again to compare")
    if best:
        towers = TwoTowers.from_pretrained(best)
    else:
        towers = copy.deepcopy(last.cpu())  # which leaves torch.compile behind
        merge(towers)
    card = model_card(run.folder, at, towers, run.model.processing, HUGGING_FACE, folder.name)
    sample = noise_and_texts(run.model.processing)
    difference = export(towers.cpu().eval(), run.model.processing, folder, sample, card=card, step=at)
    report.say(f"exported to {folder}: largest logit difference {difference:.1e}")
    return difference
