"""Export a checkpoint of a run for other programs: `python -m lib.export RUN --format FORMAT`.

The folder is loaded again and its logits are compared with the model's before it is put in place.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from lib.config.arguments import parse
from lib.errors import InputError, RunError, one_line_errors, raised_as
from lib.export import open_clip
from lib.export.card import model_card
from lib.export.checked import RECORD, export, is_export
from lib.export.formats import Format, noise_and_texts
from lib.export.hugging_face import HUGGING_FACE
from lib.export.onnx import ONNX
from lib.export.open_clip import OPEN_CLIP
from lib.export.sentence_transformers import SENTENCE_TRANSFORMERS
from lib.runs.blend import Part, blended, check_same_start, load_initial, mixed
from lib.runs.checkpoint import BEST, MANIFEST, is_whole, newest_whole
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
    """The model to export, its format, and its place."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    format: Literal["hf", "sentence-transformers", "open_clip", "onnx"] = "hf"
    """hf: for transformers (a composed pair: for this program); sentence-transformers: for it, composed pairs too;
    open_clip: for CLIP models with a vision transformer and SigLIP; onnx: each tower as a graph. docs/models.md lists
    the formats of each model."""
    checkpoint: str = "best"
    """best (the last, where nothing was evaluated), last, step_000100, or the path of a model folder. Where the run
    kept no checkpoint, best and last are RUN/export."""
    blend: float | None = None
    """Share a of the trained weights: exports (1 - a) * initial + a * trained weights (WiSE-FT), for a run that started
    from pretrained weights."""
    soup: tuple[Path, ...] = ()
    """Other runs that started from the same weights: exports the mean of their trained weights and those of RUN."""
    output: Path | None = None
    """New folder, or that of an older export; default: RUN/export, with the format's and the checkpoint's name, and
    with the blend and soup."""
    push_to_hub: str | None = None
    """OWNER/NAME of a repository of the Hugging Face hub, to upload the folder to."""
    private: bool = False
    """Make that repository a private one, where it is new."""

    def check(self) -> None:
        """Raise InputError for flags that cannot work, before anything is loaded."""
        if not self.run.is_dir():
            raise InputError(f"RUN {self.run} is no folder; give the --output-dir of a training run")
        self._check_mixture()
        if self.private and not self.push_to_hub:
            raise InputError("--private is about --push-to-hub; give both")
        if self.push_to_hub:
            _check_hub(self.push_to_hub)
        folder = self.folder
        if folder.exists() and not is_export(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"--output {folder} holds something that is no export; name another folder")

    def _check_mixture(self) -> None:
        """Raise InputError for faults of --blend and --soup."""
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise InputError(f"--blend {self.blend:g} must be between 0 (initial weights) and 1 (trained weights)")
        for run in self.soup:
            if not run.is_dir():
                raise InputError(f"--soup {run} is no folder; give the --output-dir of a training run")
        runs = (self.run, *self.soup)
        if len({run.resolve() for run in runs}) < len(runs):
            raise InputError(f"--soup {' '.join(map(str, self.soup))}: name each run once, and RUN not again")
        if self.soup and not re.fullmatch(rf"{BEST}|last|step_\d+", self.checkpoint):
            raise InputError(
                f"--checkpoint {self.checkpoint}: with --soup choose best, last or step_000100 of all runs"
            )
        mixture = self.blend is not None or self.soup
        if mixture and self.folder.resolve() == (self.run / "export").resolve():
            raise InputError(f"--output {self.output} is the trained model of the run; name another folder")

    @property
    def folder(self) -> Path:
        """Where the export goes."""
        if self.output is not None:
            return self.output.resolve()
        name = "export" if self.format == "hf" else f"export_{self.format}"
        name += "" if self.checkpoint == "best" else f"_{Path(self.checkpoint).resolve().name}"
        name += "_soup" if self.soup else ""
        return self.run / (name if self.blend is None else f"{name}_blend_{self.blend:g}")

    @property
    def form(self) -> Format:
        """The format; open_clip's files contain the name of the repository that they will be in."""
        form = FORMATS[self.format]
        if form is OPEN_CLIP and self.push_to_hub:
            return replace(form, write=partial(open_clip.write, repository=self.push_to_hub))
        return form


def main(arguments: Sequence[str] | None = None) -> None:
    """Export by the flags of the command line (or `arguments`)."""
    config: ExportConfig = parse(
        ExportConfig,
        arguments,
        prog="python -m lib.export",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    config.check()
    checkpoint = _find_checkpoint(config.run, config.checkpoint)
    towers, processing = TwoTowers.from_pretrained(checkpoint), Processing.from_pretrained(checkpoint)
    form, folder = config.form, config.folder
    name, on_hub = config.push_to_hub or folder.name, config.push_to_hub is not None
    step = _step_of(config.run, checkpoint)
    mixture = _mix(config, towers)
    card = model_card(config.run, step, towers, processing, form, name, on_hub, mixture)
    with raised_as(
        lambda fault: InputError(f"--output {folder} cannot be written ({fault}); name another folder"), OSError
    ):
        sample = noise_and_texts(processing)
        difference = export(towers, processing, folder, sample, form=form, card=card, step=step)
    print(f"exported {checkpoint} to {folder}: largest logit difference {difference:.1e}")
    if config.push_to_hub:
        print(f"pushed to {_push(folder, config.push_to_hub, config.private)}")


def _mix(config: ExportConfig, towers: TwoTowers) -> str:
    """Put the weights of the soup and the blend into the towers, where asked; returns sentences for the model card."""
    weights, said = dict(towers.state_dict()), []
    if config.soup:
        runs = (config.run, *config.soup)
        check_same_start(runs)
        folders = (_find_checkpoint(run, config.checkpoint) for run in runs)
        models = (Part(str(each), 1 / len(runs), TwoTowers.from_pretrained(each).state_dict()) for each in folders)
        weights = mixed(models)
        said.append(f"The trained weights are the mean of {len(runs)} runs (model soup, arXiv:2203.05482).")
    if config.blend is not None:
        weights = blended(load_initial(config.run).weights, weights, config.blend, config.run)
        said.append(
            f"Blended: {1 - config.blend:g} x initial weights + {config.blend:g} x trained weights (WiSE-FT, "
            "arXiv:2109.01903)."
        )
    towers.load_state_dict(weights)
    return " ".join(said)


def _find_checkpoint(run: Path, name: str) -> Path:
    """The folder of a model: best (of a run without evaluations the last), last, step_000100, or a path.

    Of a run that kept no checkpoint, best and last are its export. The number of ranks that wrote a checkpoint does not
    matter. Raises InputError where there is no such model, or not whole.
    """
    root = run / "checkpoints"
    if name in (BEST, "last"):
        best = (root / BEST).resolve()
        found = best if name == BEST and is_whole(best) else newest_whole(root)
        if found is None and is_export(run / "export"):
            found = run / "export"
        if found is None:
            raise InputError(
                f"RUN {run} holds no whole checkpoint and no export; name a run, or a model by --checkpoint PATH"
            )
        return found
    folder = root / name if (root / name).exists() else Path(name)
    known = sorted(each.name for each in root.glob("step_*") if is_whole(each))
    choices = f"choose best, last, {', '.join(known)} or the path of a model folder"
    if not (folder / "config.json").is_file():
        raise InputError(f"--checkpoint {name}: no such model; {choices}")
    if not is_whole(folder) and ((folder / MANIFEST).exists() or folder.parent == root):
        raise InputError(f"--checkpoint {name} is not whole; {choices}")
    return folder


def _step_of(run: Path, folder: Path) -> int | None:
    """The step that a checkpoint or the run's export was written after; None for another model folder."""
    if (folder / MANIFEST).is_file():
        return json.loads((folder / MANIFEST).read_text())["progress"]["step"]
    own = folder.resolve() == (run / "export").resolve() and is_export(folder)
    return json.loads((folder / RECORD).read_text()).get("step") if own else None


def _check_hub(repo_id: str) -> None:
    """Raise InputError where a push cannot succeed, before the work of an export."""
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id  # the hub knows the owner of a bare name, the card's example would not
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"--push-to-hub {repo_id} is no name for the hub; give OWNER/NAME")
    if constants.is_offline_mode():
        raise InputError(f"--push-to-hub {repo_id}: HF_HUB_OFFLINE is set; unset it, or leave the flag out")
    if get_token() is None:
        raise InputError(f"--push-to-hub {repo_id}: nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def _push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a finished export as one commit, making the repository where there is none; returns its address."""
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export a model")
    except (HTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RunError(
            f"--push-to-hub {repo_id} failed ({reason}); the export is whole in {folder}: "
            f"`hf upload {repo_id} {folder}` sends it"
        ) from error
    return str(address)


if __name__ == "__main__":
    with one_line_errors():
        main()
