"""The weights that a run started from, and models between them and the trained ones.

Sources: Wortsman et al., Robust fine-tuning of zero-shot models, 2022, arXiv:2109.01903 (WiSE-FT, blends of initial and
trained weights); Wortsman et al., Model soups, 2022, arXiv:2203.05482 (means of runs that share a start).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lib.data.durable import Damaged, digest_of, load_checked, save_checked
from lib.errors import InputError, raised_as
from lib.files import without_secrets

INITIAL = "initial.safetensors"
"""File of a run: the weights that its first step saw, named as in `TwoTowers.state_dict`, with their hash."""


class Initial(NamedTuple):
    """The weights before a run's first step."""

    weights: dict[str, Tensor]
    source: str
    """hub id or folder of the model, or of both towers"""
    start: str
    """hash of the towers' weights; equal for runs that share a start"""


class Part(NamedTuple):
    """One of the models of a weighted sum."""

    name: str
    """for errors"""
    share: float
    weights: Mapping[str, Tensor]


def save_initial(run: Path, weights: Mapping[str, Tensor], source: str) -> None:
    """Store the weights of the plain model before the first step, whole or not at all.

    The hash of the start leaves scale and bias out: a sigmoid run from a softmax-trained model solves its bias on its
    first batch, and runs that differ in nothing but their seed share a start.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    start = digest_of({name: value for name, value in tensors.items() if not name.startswith("logit_")})
    save_checked(tensors, run / INITIAL, {"source": without_secrets(source), "start": start})


def copy_initial(checkpoint: Path, run: Path) -> None:
    """Copy the initial weights, where there are any, to a run that resumes from another run's checkpoint."""
    source, target = checkpoint.resolve().parents[1] / INITIAL, run / INITIAL
    if source == target.resolve():
        return
    target.unlink(missing_ok=True)
    with suppress(Damaged):
        tensors, metadata = load_checked(source)
        save_checked(tensors, target, metadata)


def load_initial(run: Path) -> Initial:
    """Read a run's initial weights; InputError if there are none, or if they do not have their hash."""
    file = run / INITIAL
    if not file.is_file():
        raise InputError(
            f"{run} has no initial weights ({INITIAL}), which --blend and --soup need; a run stores them if it starts "
            "from pretrained weights"
        )
    with raised_as(lambda fault: InputError(f"{fault}; copy it again, or leave --blend and --soup out"), Damaged):
        weights, metadata = load_checked(file)
    return Initial(weights, metadata["source"], metadata["start"])


def check_same_start(runs: Sequence[Path]) -> None:
    """Raise InputError unless all runs have the same initial weights, apart from scale and bias."""
    first, *others = (load_initial(run)[1:] for run in runs)
    for run, start in zip(runs[1:], others, strict=True):
        if start[1] != first[1]:
            raise InputError(
                f"--soup: {runs[0]} (from {first[0]}) and {run} (from {start[0]}) started from different weights; "
                "average runs that share their initial weights"
            )


def blended(initial: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float, run: Path) -> dict[str, Tensor]:
    """(1 - share) * initial + share * trained; the scale's logarithm is interpolated, as it is the parameter.

    Raises InputError, naming the run, where the weights have other names or shapes.
    """
    return mixed([Part("the trained model", share, trained), Part(str(run / INITIAL), 1 - share, initial)])


def mixed(parts: Iterable[Part]) -> dict[str, Tensor]:
    """The weighted sum of models, computed in float64; integer tensors are those of the first model.

    parts: read one at a time. Raises InputError where the weights have other names or shapes.
    """
    total: dict[str, Tensor] = {}
    first: Part | None = None
    for part in parts:
        first = first or part
        _check_alike(first, part)
        for name, value in part.weights.items():
            if first.weights[name].is_floating_point():
                total[name] = total.get(name, 0.0) + part.share * value.double()
    assert first is not None, "a sum needs a part"
    return {name: total[name].to(value.dtype) if name in total else value for name, value in first.weights.items()}


def _check_alike(first: Part, other: Part) -> None:
    shapes = [{name: tuple(value.shape) for name, value in part.weights.items()} for part in (first, other)]
    differing = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
    if differing:
        here, there = (of_one.get(differing[0], "missing") for of_one in shapes)
        raise InputError(
            f"{differing[0]} has the shape {here} in {first.name} and {there} in {other.name}; use models of one "
            "structure"
        )
