"""What trains: --freeze and --unfreeze by part, by last blocks, or by a pattern over the names of parameters."""

import difflib
import re
from collections.abc import Sequence

from torch import nn

from lib.errors import InputError
from lib.towers import TwoTowers
from lib.towers.blocks import blocks, depths

PARTS = ("image", "image.trunk", "image.head", "text", "text.trunk", "text.head", "scale", "bias")
PATTERN = "re:"
_LAST = re.compile(r"(image|text)\.last:(\d+)")
_ALL_NAMES = (*PARTS, "image.last:N", "text.last:N")


def set_trainable(towers: TwoTowers, freeze: Sequence[str], unfreeze: Sequence[str] = ()) -> None:
    """Stop training what `freeze` names, then train again what `unfreeze` names of it.

    A name is one of `PARTS`; `image.last:N` for the last N blocks of a trunk with the norm and pooler behind them; or
    `re:PATTERN`, searched in the names of parameters. What did not train before (a part of an encoder that its
    output does not depend on) is not trained by any name. Frozen modules stay in eval mode (see `TwoTowers.train`).
    Raises InputError for an unknown name and for one that names nothing.
    """
    can_train = {name: p for name, p in towers.named_parameters() if p.requires_grad}
    for flag, names, train in (("--freeze", freeze, False), ("--unfreeze", unfreeze, True)):
        for name in names:
            for chosen in _parameters_of(towers, f"{flag} {name}"):
                if chosen in can_train:
                    can_train[chosen].requires_grad_(train)
    towers.train(towers.training)


def trained_share(towers: TwoTowers) -> tuple[int, int]:
    """How many numbers train, of how many."""
    counts = [(p.numel(), p.requires_grad) for p in towers.parameters()]
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)


def _parameters_of(towers: TwoTowers, asked: str) -> list[str]:
    """The names of the parameters that a flag with its value, as in `--freeze image.last:2`, is about."""
    name = asked.split(" ", 1)[1]
    if name.startswith(PATTERN):
        return _matching(towers, asked, name.removeprefix(PATTERN))
    if last := _LAST.fullmatch(name):
        return _last_blocks(towers, asked, last[1], int(last[2]))
    if name not in PARTS:
        nearest = difflib.get_close_matches(name, _ALL_NAMES, n=1, cutoff=0.0)[0]
        raise InputError(
            f"{asked}: no such part, the nearest is {nearest}; all are {', '.join(_ALL_NAMES)}, or {PATTERN}PATTERN"
        )
    if name == "scale":
        return ["logit_scale"]
    if name == "bias":
        return ["logit_bias"] if towers.use_bias else []
    found = [f"{name}.{own}" for own, _ in towers.get_submodule(name).named_parameters()]
    if not found:
        tower = name.split(".")[0]
        raise InputError(f"{asked}: this model's {tower} tower has no head; use {asked.split(' ')[0]} {tower}")
    return found


def _matching(towers: TwoTowers, asked: str, pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{asked}: not a regular expression ({error})") from error
    names = [name for name, _ in towers.named_parameters()]
    found = [name for name in names if compiled.search(name)]
    if not found:
        plain = re.sub(r"[^\w.]+", "", pattern)
        nearest = difflib.get_close_matches(plain, names, n=1, cutoff=0.0)[0]
        raise InputError(f"{asked}: it matches no parameter; the nearest name is {nearest}")
    return found


def _last_blocks(towers: TwoTowers, asked: str, tower: str, count: int) -> list[str]:
    trunk: nn.Module = towers.get_submodule(f"{tower}.trunk")
    depth_of = depths(trunk)
    count_of_all = len(blocks(trunk))
    if not count_of_all:
        raise InputError(
            f"{asked}: the blocks of a {type(trunk).__name__} are not known; name them by a pattern over the names of "
            f"parameters, such as {PATTERN}{tower}.trunk.{next(iter(depth_of)).split('.')[0]}"
        )
    if not 1 <= count <= count_of_all:
        raise InputError(
            f"{asked}: the {tower} tower has {count_of_all} blocks; give a number from 1 to {count_of_all}"
        )
    return [f"{tower}.trunk.{name}" for name, depth in depth_of.items() if depth > count_of_all - count]
