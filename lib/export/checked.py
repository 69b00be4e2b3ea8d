"""Owns the promise of an export: the folder is there whole and gives the model's logits, or it is not there."""

import os
import shutil
from pathlib import Path

from lib.data.durable import seal
from lib.errors import RunError
from lib.export.formats import HUGGING_FACE, Format
from lib.export.sample import Sample, expected_logits
from lib.files import write_text
from lib.towers import TwoTowers
from lib.towers.image_form import TOLERANCE as PIXEL_TOLERANCE
from lib.towers.image_form import difference_of_files
from lib.towers.model_files import quiet
from lib.towers.processing import Processing

TOLERANCE = 1e-4
RECORD, CARD = "export.json", "README.md"


def export(
    towers: TwoTowers,
    processing: Processing,
    folder: str | Path,
    sample: Sample,
    *,
    form: Format = HUGGING_FACE,
    card: str | None = None,
    step: int | None = None,
) -> float:
    """Write the folder whole or not at all; returns the largest difference in a logit after loading it.

    card: text of README.md; step: of the run, that the model is of.
    Above a difference of 1e-4 it raises RunError, as where the written image processor, loaded again, prepares a probe
    image otherwise than the run; and InputError where the form is not for this model. An older folder stays then.
    """
    form.check(towers)
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        expected = expected_logits(towers, sample)
        with quiet():
            form.write(towers, processing, unfinished)
            apart = difference_of_files(processing.image_form, unfinished)
            found = form.logits(towers, processing, unfinished, sample)
        if apart is not None and not apart <= PIXEL_TOLERANCE:
            raise RunError(
                f"the image processor of the export to {folder} gives pixels that differ by {apart:.1f} of 255 levels "
                "on average from those of the run; nothing was written there"
            )
        difference = (found.cpu() - expected).abs().max().item()
        if not difference <= TOLERANCE:  # a NaN is a failure too
            raise RunError(
                f"the export to {folder} differs from the model by {difference:.2e} in a logit, more than "
                f"{TOLERANCE:g}; nothing was written there"
            )
        _finish(unfinished, towers, difference, card, step)
        _replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `export`, and may be replaced by it."""
    return (folder / RECORD).is_file()


def _finish(folder: Path, towers: TwoTowers, difference: float, card: str | None, step: int | None) -> None:
    """Add the numbers that some formats have no place for, with the hashes of all files, and the card."""
    numbers = {
        "step": step,
        "logit_scale": towers.logit_scale.exp().item(),
        "logit_bias": towers.logit_bias.item(),
        "largest_logit_difference": difference,
    }
    seal(folder, RECORD, numbers)
    if card is not None:  # after the hashes: people write into it
        write_text(folder / CARD, card)


def _replace(unfinished: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one, if there is one."""
    outdated = folder.with_name(f".{folder.name}.outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if folder.exists():
        os.rename(folder, outdated)
    os.rename(unfinished, folder)
    shutil.rmtree(outdated, ignore_errors=True)
