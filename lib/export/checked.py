"""Write an export whole, and only if the folder, loaded again, gives the model's logits."""

import os
import shutil
from pathlib import Path

from lib.data.durable import seal
from lib.errors import RunError
from lib.export.formats import Format, Sample, expected_logits
from lib.export.hugging_face import HUGGING_FACE
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

    card: text of README.md; step: of the run, after which the model was saved.
    Raises RunError above a difference of 1e-4, or where the written image processor, loaded again, prepares a probe
    image otherwise than the run; and InputError where the format does not fit this model. An older folder stays then.
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
        numbers = {  # some formats have no place for these
            "step": step,
            "logit_scale": towers.logit_scale.exp().item(),
            "logit_bias": towers.logit_bias.item(),
            "largest_logit_difference": difference,
        }
        seal(unfinished, RECORD, numbers)
        if card is not None:  # after the hashes of all files: people edit it
            write_text(unfinished / CARD, card)
        _replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


def is_export(folder: Path) -> bool:
    """The folder was written by `export`, and may be replaced by it."""
    return (folder / RECORD).is_file()


def _replace(unfinished: Path, folder: Path) -> None:
    """Put a finished folder in place of an older one, by renames: at no time is there half a folder of that name."""
    outdated = folder.with_name(f".{folder.name}.outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if folder.exists():
        os.rename(folder, outdated)
    os.rename(unfinished, folder)
    shutil.rmtree(outdated, ignore_errors=True)
