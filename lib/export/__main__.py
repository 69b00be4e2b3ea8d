"""Export a checkpoint of a run for other programs: `python -m lib.export RUN --format FORMAT`.

The folder is loaded again and its logits are compared with the model's before it is put in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lib.config.arguments import parse
from lib.errors import InputError, one_line_errors, raised_as
from lib.export import open_clip
from lib.export.card import model_card
from lib.export.checked import export, is_export
from lib.export.formats import HUGGING_FACE, ONNX, OPEN_CLIP, SENTENCE_TRANSFORMERS, Format
from lib.export.hub import check_hub, push
from lib.export.sample import noise_and_texts
from lib.export.source import find_checkpoint, step_of
from lib.towers import TwoTowers
from lib.towers.processing import Processing

FORMATS = {
    "hf": HUGGING_FACE,
    "open_clip": OPEN_CLIP,
    "sentence-transformers": SENTENCE_TRANSFORMERS,
    "onnx": ONNX,
}


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and to where."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    format: Literal["hf", "sentence-transformers", "open_clip", "onnx"] = "hf"
    """hf: for transformers (a composed pair: for this program); sentence-transformers: for it, composed pairs too;
    open_clip: for CLIP models with a vision transformer and SigLIP; onnx: each tower as a graph. docs/models.md says
    which model has which formats."""
    checkpoint: str = "best"
    """best (the last, where nothing was evaluated), last, step_000100, or the path of a model folder. Where the run
    kept no checkpoint, best and last are RUN/export."""
    output: Path | None = None
    """New folder, or that of an older export; default: RUN/export, with the format's and the checkpoint's name."""
    push_to_hub: str | None = None
    """OWNER/NAME of a repository of the Hugging Face hub, to upload the folder to."""
    private: bool = False
    """Make that repository a private one, where it is new."""

    def check(self) -> None:
        """Raise InputError for what cannot work, before anything is loaded."""
        if not self.run.is_dir():
            raise InputError(f"RUN {self.run} is no folder; name the --output-dir of a training run")
        if self.private and not self.push_to_hub:
            raise InputError("--private is about --push-to-hub; give both")
        if self.push_to_hub:
            check_hub(self.push_to_hub)
        folder = self.folder
        if folder.exists() and not is_export(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"--output {folder} holds something that is no export; name another folder")

    @property
    def folder(self) -> Path:
        """Where the export goes."""
        if self.output is not None:
            return self.output.resolve()
        name = "export" if self.format == "hf" else f"export_{self.format}"
        return self.run / (name if self.checkpoint == "best" else f"{name}_{Path(self.checkpoint).resolve().name}")

    @property
    def form(self) -> Format:
        """The format; open_clip's files name the repository that they will be in."""
        form = FORMATS[self.format]
        if form is OPEN_CLIP and self.push_to_hub:
            return replace(form, write=partial(open_clip.write, repository=self.push_to_hub))
        return form


def main(arguments: Sequence[str] | None = None) -> None:
    """Export as the command line (or `arguments`) says."""
    config: ExportConfig = parse(
        ExportConfig,
        arguments,
        prog="python -m lib.export",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    config.check()
    checkpoint = find_checkpoint(config.run, config.checkpoint)
    towers, processing = TwoTowers.from_pretrained(checkpoint), Processing.from_pretrained(checkpoint)
    form, folder = config.form, config.folder
    name, on_hub = config.push_to_hub or folder.name, config.push_to_hub is not None
    step = step_of(config.run, checkpoint)
    card = model_card(config.run, step, towers, processing, form, name, on_hub)
    with raised_as(
        lambda fault: InputError(f"--output {folder} cannot be written ({fault}); name another folder"), OSError
    ):
        sample = noise_and_texts(processing)
        difference = export(towers, processing, folder, sample, form=form, card=card, step=step)
    print(f"exported {checkpoint} to {folder}: largest logit difference {difference:.1e}")
    if config.push_to_hub:
        print(f"pushed to {push(folder, config.push_to_hub, config.private)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
