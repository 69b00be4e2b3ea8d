"""Gradient checkpointing and compilation of the trunks."""

import warnings
from collections.abc import Callable
from typing import Literal, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from lib.errors import InputError
from lib.towers import TwoTowers
from lib.towers.tower import is_frozen

_Options = dict[str, str | int | bool | Callable]

COMPILE_OPTIONS: dict[str, _Options | None] = {"inductor": {"fallback_random": True}, "aot_eager": None}
"""torch.compile's options by backend. Dropout has to draw the same in both passes of a step: as without compiling."""

RECOMPILE_LIMIT = 64


def checkpoint_activations(towers: TwoTowers) -> None:
    """Keep only the inputs of each block and run it again in the backward pass, in every trunk that offers it.

    Raises InputError where no trunk that trains does.
    """
    offering = [trunk for trunk in _trunks(towers).values() if _offers_checkpointing(trunk)]
    for trunk in offering:
        if hasattr(trunk.config, "use_cache"):  # of text generation: it would warn
            trunk.config.use_cache = False
        with warnings.catch_warnings():  # newer transformers know it by another name, which older ones lack
            warnings.simplefilter("ignore", FutureWarning)
            trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if all(is_frozen(trunk) for trunk in offering):
        kinds = " and ".join(f"{type(trunk).__name__} ({tower})" for tower, trunk in _trunks(towers).items())
        raise InputError(
            f"--gradient-checkpointing: no trunk that trains offers it, of {kinds}; leave it out: a smaller "
            "--chunk-size saves memory too"
        )


def keeping_activations(towers: TwoTowers) -> list[str]:
    """The towers whose trunk trains and offers no checkpointing: image, text."""
    training = [(tower, trunk) for tower, trunk in _trunks(towers).items() if not is_frozen(trunk)]
    return [tower for tower, trunk in training if not _offers_checkpointing(trunk)]


def compile_trunks(towers: TwoTowers, backend: Literal["inductor", "aot_eager"], device: torch.device) -> None:
    """Compile both trunks in place, so that names of parameters stay; InputError where this machine cannot.

    The first forward of each kind (with and without graph, training and evaluation) takes the time to compile.
    """
    options = COMPILE_OPTIONS[backend]
    try:  # a missing or broken C++ compiler shows only when something is compiled
        torch.compile(torch.sin, backend=backend, options=options)(torch.ones(64, device=device))
    except Exception as error:  # of many kinds, by backend and version
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"--compile: {backend} does not work here ({reason}); install a C++ compiler (g++, or name yours in CXX), "
            "or leave --compile out"
        ) from error
    dynamo = torch._dynamo.config
    # Both trunks share transformers' wrappers, each is compiled with and without a graph, for training, evaluation and
    # the last chunk's size; beyond the limit torch would continue without compiling.
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    # Cutting graphs at DDP's buckets gains nothing: of a step's many backward passes only the last reduces.
    dynamo.optimize_ddp = False
    for trunk in _trunks(towers).values():
        trunk.compile(backend=backend, options=options)


def _trunks(towers: TwoTowers) -> dict[str, nn.Module]:
    return {"image": towers.image.trunk, "text": towers.text.trunk}


def _offers_checkpointing(trunk: nn.Module) -> TypeGuard[PreTrainedModel]:
    return bool(getattr(trunk, "supports_gradient_checkpointing", False))
