"""benchmarks/positives.py and negatives.py train each cell of their grids with the scripts, and write the results."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from small_runs import save_encoders

RECIPE = """
image_size: 32
freeze: [image.trunk, text.trunk]
chunk_size: 4
effective_batch: 8
steps: 2
eval_every: 2
save_every: 0
workers: 0
"""


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> list[str]:
    folder = save_encoders(tmp_path_factory.mktemp("encoders"))
    return [f"--image-tower={folder / 'vit'}", f"--text-tower={folder / 'bert'}"]


def measured(script: str, folder: Path, *flags: str) -> tuple[list[dict], str]:
    """The raw results and the output."""
    (folder / "recipe.yaml").write_text(RECIPE)
    own = [
        f"--config={folder / 'recipe.yaml'}",
        f"--output={folder / 'rows.json'}",
        f"--cache-dir={folder}",
        "--seeds=1",
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / script), *own, *flags]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert finished.returncode == 0, finished.stderr
    return json.loads((folder / "rows.json").read_text()), finished.stdout


def picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)


@pytest.mark.slow
def test_negatives_trains_every_batch_with_and_without_a_memory(towers, tmp_path):
    rows = [("filename", "caption", "split")]
    for number in range(20):
        picture(tmp_path / f"{number}.png", number)
        rows.append((f"{number}.png", f"a picture of {number}", "val" if number >= 16 else "train"))
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    flags = [f"--data={tmp_path / 'captions.csv'}", "--batches", "4", "8", "--memories", "0", "2"]
    found, printed = measured("negatives.py", tmp_path, *towers, *flags)
    assert [(row["loss"], row["batch"], row["memory"]) for row in found] == [
        (loss, batch, memory) for loss in ("clip", "siglip") for batch in (4, 8) for memory in (0, 2 * batch)
    ]
    for row in found:
        (run,) = row["runs"]
        assert run["steps"] == 2 and 0 <= run["image_to_text"] <= 1 and 0 <= run["text_to_image"] <= 1
    assert "| clip | 8 | 16 | 2 |" in printed


@pytest.mark.slow
def test_positives_trains_groups_and_the_diagonal(towers, tmp_path):
    for number in range(24):
        picture(tmp_path / ("train" if number < 16 else "test") / ("cat", "dog")[number % 2] / f"{number}.png", number)
    found, printed = measured("positives.py", tmp_path, *towers, f"--data={tmp_path}")
    assert [(row["positives"], row["memory"]) for row in found[:4]] == [
        ("pair", False), ("pair", True), ("group", False), ("group", True),
    ]  # fmt: skip
    assert len(found) == 8 and "| siglip | group | on |" in printed
