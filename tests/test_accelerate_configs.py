"""The headline command under every file of accelerate_configs that a CPU can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run as torchrun
from accelerate.commands.launch import launch_command, launch_command_parser
from conftest import ROOT
from ranks import on_ranks

import train_siglip

pytestmark = pytest.mark.slow

HEADLINE = ["--effective-batch", "32", "--xbm-size", "32", "--steps", "1", "--eval-every", "0"]
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def config_file(name: str) -> list[str]:
    return ["--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml")]


def environment_of(name: str, monkeypatch) -> dict[str, str]:
    """Environment that `accelerate launch` gives the ranks with this file."""
    told: dict[str, str] = {}
    with monkeypatch.context() as patch:
        patch.setattr(torchrun, "run", lambda _: told.update(os.environ))
        launch_command(launch_command_parser().parse_args([*config_file(name), "train_siglip.py"]))
    return {name: value for name, value in told.items() if name not in OF_RANKS}


def headline(environment: dict[str, str], folder: Path) -> None:
    os.environ.update(environment)
    train_siglip.main([*HEADLINE, f"--output-dir={folder}"])


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"])
def test_what_a_config_tells_the_ranks_trains_in_bf16_on_two_of_them(name, tmp_path, monkeypatch):
    environment = environment_of(name, monkeypatch)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    on_ranks(2, headline, environment, tmp_path / "run")
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "ranks"), [("cpu", "1 rank"), ("zero2", "2 ranks")])
def test_the_headline_command_as_a_user_types_it(name, ranks, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", *config_file(name)]
    command = [*launch, str(ROOT / "train_siglip.py"), *HEADLINE]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert f"{ranks} x" in finished.stdout
    assert (tmp_path / "runs" / "siglip" / "export" / "model.safetensors").exists()
