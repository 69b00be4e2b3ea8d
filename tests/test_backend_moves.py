"""A checkpoint resumes on another backend and number of ranks: weights, moments, schedule, memory bank and step."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from ranks import on_ranks
from safetensors.torch import load_file
from small_runs import losses
from test_backends import KINDS
from transformers import AutoModel

import train_siglip
from lib.runs.reporter import read_metrics

pytestmark = pytest.mark.slow

FLAGS = [
    "--effective-batch=24", "--chunk-size=4", "--xbm-size=30", "--xbm-start=2", "--lr=1e-3", "--warmup-steps=2",
    "--schedule=linear", "--steps=7", "--save-every=1", "--keep-checkpoints=0", "--workers=0", "--eval-every=0",
]  # fmt: skip


def go_on(kind: str, start: Path, step: int, folder: Path, *flags: str) -> None:
    """Resume from a step of a run in a new folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(KINDS[kind])
    resume = f"--resume={start / 'checkpoints' / f'step_{step:06d}'}"
    train_siglip.main([*FLAGS, f"--output-dir={folder}", resume, *flags])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moves") / "unbroken"
    AcceleratorState._reset_state(reset_partial_state=True)
    train_siglip.main([*FLAGS, f"--output-dir={folder}"])
    return folder


def test_one_process_to_four_ranks_to_every_sharded_kind_and_back_keeps_the_curve(unbroken, tmp_path):
    on_ranks(4, go_on, "ddp", unbroken, 2, tmp_path / "ddp")
    for kind, before, step in (("fsdp2", "ddp", 3), ("zero2", "fsdp2", 4), ("zero3", "zero2", 5)):
        checked = ("--eval-every=1", "--verify-gradients")
        on_ranks(2, go_on, kind, tmp_path / before, step, tmp_path / kind, *checked)
    go_on("ddp", tmp_path / "zero3", 6, tmp_path / "back")
    curve = losses(unbroken)
    for name, first in (("ddp", 3), ("fsdp2", 4), ("zero2", 5), ("zero3", 6), ("back", 7)):
        assert losses(tmp_path / name) == pytest.approx(curve[first - 1 :], rel=1e-4), name
    last = "checkpoints/step_000007"
    for file in ("model.safetensors", "memory.safetensors"):
        here, there = load_file(tmp_path / "back" / last / file), load_file(unbroken / last / file)
        assert here.keys() == there.keys()
        for name in there:
            # AdamW makes whole steps of gradients that are nearly zero, whose sign may be rounding.
            torch.testing.assert_close(here[name], there[name], rtol=1e-3, atol=1e-4)
    moments = [torch.load(run / last / "optimizer.pt")["moments"] for run in (tmp_path / "back", unbroken)]
    assert moments[0].keys() == moments[1].keys()
    for name, state in moments[1].items():
        assert state.keys() == moments[0][name].keys()
        assert state["step"] == moments[0][name]["step"] == 7
    for name in ("fsdp2", "zero2", "zero3"):  # whole models, whatever made them
        lines = [line["eval"] for line in read_metrics(tmp_path / name) if "eval" in line]
        assert lines and all(0 <= line["accuracy"] <= 1 for line in lines)
        assert AutoModel.from_pretrained(tmp_path / name / "export").num_parameters() > 0
