"""--verify-gradients on two ranks of every kind: it passes, changes nothing, and stops a broken build."""

import os
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from ranks import on_ranks
from test_backends import KINDS

import train_siglip
from lib.errors import RunError
from lib.report import read_metrics
from lib.surrogate import Surrogate

FLAGS = [
    "--effective-batch=32", "--chunk-size=8", "--xbm-size=0", "--steps=2", "--warmup-steps=0", "--dropout=0.2",
    "--eval-every=0", "--save-every=0", "--workers=0", "--optimizer=sgd", "--lr=0.1",
]  # fmt: skip


def losses(folder: Path, kind: str, *flags: str) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(KINDS[kind])
    train_siglip.main([*FLAGS, f"--output-dir={folder}", *flags])
    return [line["loss"] for line in read_metrics(folder)]


def verified(folder: Path, kind: str) -> list[float]:
    return losses(folder / "verified", kind, "--verify-gradients")


def stopped(folder: Path, kind: str) -> bool:
    """Whether scale gradients that are as many times too large as there are chunks stop the run."""
    surrogate = Surrogate.__call__
    Surrogate.__call__ = lambda self, index, output, final: surrogate(self, index, output, True)
    try:
        losses(folder / "broken", kind, "--verify-gradients")
    except RunError as error:
        return "logit_scale" in str(error)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3", "fsdp2"])
def test_it_passes_on_two_ranks_and_leaves_the_run_as_it_is(kind, tmp_path):
    assert on_ranks(2, verified, tmp_path, kind) == on_ranks(2, losses, tmp_path / "plain", kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_it_stops_a_broken_build_on_two_ranks(kind, tmp_path):
    assert on_ranks(2, stopped, tmp_path, kind)
