"""--help as a user reads it: flags in groups, each once, with its default."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TASKS

import evaluate
import train_clip
import train_siglip
from lib.config import TrainConfig, flag

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {
    "most-used": [
        "data", "hold_out", "model", "image_tower", "text_tower", "freeze", "effective_batch", "xbm_size", "epochs",
        "lr", "output_dir", "resume",
    ],
    "data": ["val_data", "prompts", "max_bad", "workers", "cache_dir", "store_outputs", "data_info"],
    "images": ["image_size", "augment"],
    "model": ["projection", "projection_dim"],
    "fine-tuning": ["unfreeze", "lora"],
    "batch": ["chunk_size", "keep_graphs", "xbm_start"],
    "loss": ["positives", "label_smoothing", "pos_weight", "scale_max"],
    "optimizer": ["steps", "warmup_steps", "seed"],
    "evaluation": ["eval_every", "best_metric", "patience"],
    "run": ["save_every", "tracker"],
    "file": ["config"],
}  # fmt: skip
FRAMES = str.maketrans("│╭╮╰╯─", "      ")  # of tyro's boxes, where the terminal has such letters


def boxes(script, capsys, monkeypatch, *task: str) -> dict[str, str]:
    """The text of each group's box; "options" is that of flags without a group, but for --help alone."""
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit, match="0"):
        script.main([*task, "--help"])
    told = capsys.readouterr().out.translate(FRAMES)
    parts = re.split(r"^ +(?:([\w-]+) )?options *$", told, flags=re.MULTILINE)
    found = {name or "options": text for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {name: text for name, text in found.items() if flags_of(text)}


def flags_of(box: str) -> dict[str, str]:
    """Help text of each flag of a box."""
    parts = re.split(r"^ {1,4}(--[a-z][\w-]*)", box, flags=re.MULTILINE)
    return {name: " ".join(told.split()) for name, told in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("script", [train_clip, train_siglip])
def test_every_flag_is_told_once_in_a_group_with_its_default(script, capsys, monkeypatch):
    told = {group: flags_of(box) for group, box in boxes(script, capsys, monkeypatch).items()}
    assert list(told) == list(GROUPS)
    assert set(told["most-used"]) == {flag(name) for name in GROUPS["most-used"]}, "the first box has these alone"
    for group, names in GROUPS.items():
        assert {flag(name) for name in names} <= told[group].keys()
    flags = [name for group in told.values() for name in group]
    fields = dataclasses.fields(TrainConfig)
    assert sorted(flags) == sorted(["--config", *(flag(field.name) for field in fields)])
    words = {name: text for group in told.values() for name, text in group.items()}
    for field in fields:
        value = getattr(script.DEFAULTS, field.name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert words[flag(field.name)].endswith(f"(default: {shown})"), field.name


@pytest.mark.parametrize("script", ["train_siglip.py", "evaluate.py"])
def test_help_whose_reader_goes_away_ends_without_a_traceback(script):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, script, *(["zeroshot"] if script == "evaluate.py" else []), "--help"]
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.returncode == 1 and ended.stderr == ""


def test_the_scripts_differ_in_their_defaults_alone(capsys, monkeypatch):
    clip, siglip = (boxes(script, capsys, monkeypatch) for script in (train_clip, train_siglip))
    differing = {
        name for group in clip for name, text in flags_of(clip[group]).items() if text != flags_of(siglip[group])[name]
    }
    assert differing == {"--beta2", "--weight-decay", "--scale-max"}


def test_what_is_counted_or_measured_says_in_what(capsys, monkeypatch):
    told = {
        name: text for box in boxes(train_clip, capsys, monkeypatch).values() for name, text in flags_of(box).items()
    }
    units = {
        "--image-size": "pixels", "--shard-cache-gib": "GiB", "--save-every": "Steps",
        "--eval-every": "Steps", "--warmup-steps": "Steps", "--xbm-size": "pairs", "--chunk-size": "pairs",
        "--max-bad": "fraction", "--dropout": "probability", "--epochs": "Passes",
    }  # fmt: skip
    assert not [name for name, unit in units.items() if unit not in told[name]]


@pytest.mark.parametrize("task", TASKS)
def test_tasks_of_evaluate_tell_data_and_run_apart_from_their_own(task, capsys, monkeypatch):
    told = {group: flags_of(box) for group, box in boxes(evaluate, capsys, monkeypatch, task).items()}
    assert list(told) == ["options", "data", "run"]
    assert {"--data", "--split", "--hold-out", "--limit"} <= told["data"].keys()
    assert {"--output-dir", "--batch-size", "--cache-dir", "--seed"} <= told["run"].keys()
    assert "--model" in told["options"] or "--models" in " ".join(told["options"].values())
    for flags in told.values():
        assert [name for name, text in flags.items() if not re.search(r"\((default: .*|required)\)$", text)] == []
