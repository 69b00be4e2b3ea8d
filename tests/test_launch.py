"""Launchers, configs, and errors as a user meets them: once, in one line, with the right exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT

import train_clip
import train_siglip
from lib.config import parse_config

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def run(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_the_headline_command_works_from_any_folder_without_a_data_flag(tmp_path):
    """With a small batch; the plan prints its numbers of negatives."""
    command = [*LAUNCH, str(ROOT / "train_siglip.py"), "--effective-batch", "96", "--xbm-size", "64", "--steps", "2"]
    finished = run([*command, "--eval-every", "0"], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "95 fresh and 64 remembered negatives" in finished.stdout
    assert (tmp_path / "runs" / "siglip" / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_an_error_is_one_line_on_one_rank_with_exit_code_2(tmp_path):
    script = [str(ROOT / "train_clip.py"), "--effective-batch", "33", "--output-dir", str(tmp_path / "run")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = run([*torchrun, *script])
    told = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert told == ["error: --effective-batch 33 is not divisible by 2 ranks; the nearest that is: 32"]
    alone = run([sys.executable, *script[:1], "--lr", "-1"])
    assert alone.returncode == 2
    assert alone.stderr.strip() == "error: --lr -1.0 must be greater than 0"


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_holds_settings_that_both_scripts_take(file):
    towers = ["--image-tower=i", "--text-tower=t"] if "projection" in file.read_text() else []
    for script in (train_clip, train_siglip):
        config = parse_config(script.DEFAULTS, "", ["--config", str(file), *towers])
        assert config != script.DEFAULTS


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_accelerate_config_loads(file):
    assert load_config_from_file(str(file)).num_processes >= 1


@pytest.mark.parametrize(
    "file", [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda file: file.name
)
def test_every_launcher_is_sound_bash(file):
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
