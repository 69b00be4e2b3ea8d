"""benchmarks/positives.py, negatives.py and defaults.py train each cell of their grids and write the results."""

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


def table_of(folder: Path, count: int) -> Path:
    """Images with a caption each, the last four for validation."""
    rows = [("filename", "caption", "split")]
    for number in range(count):
        picture(folder / f"images/{number}.png", number)
        rows.append((f"images/{number}.png", f"a picture of {number}", "val" if number >= count - 4 else "train"))
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "captions.csv"


def classes_of(folder: Path) -> Path:
    """16 training images and 8 test images of two classes."""
    for number in range(24):
        picture(folder / ("train" if number < 16 else "test") / ("cat", "dog")[number % 2] / f"{number}.png", number)
    return folder


@pytest.mark.slow
def test_negatives_trains_every_batch_with_and_without_a_memory(towers, tmp_path):
    flags = [f"--data={table_of(tmp_path, 20)}", "--batches", "4", "8", "--memories", "0", "2"]
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
    found, printed = measured("positives.py", tmp_path, *towers, f"--data={classes_of(tmp_path / 'images')}")
    assert [(row["positives"], row["memory"]) for row in found[:4]] == [
        ("pair", False), ("pair", True), ("group", False), ("group", True),
    ]  # fmt: skip
    assert len(found) == 8 and "| siglip | group | on |" in printed


@pytest.mark.slow
def test_defaults_trains_the_grid_on_parts_of_the_data_and_goes_on_where_it_ended(towers, tmp_path):
    flags = [f"--data={classes_of(tmp_path / 'images')}", *towers, "--sizes"]
    found, _ = measured("defaults.py", tmp_path, *flags, "8", "--no-former")
    settings = [row["settings"] for row in found]
    assert settings[0] == "auto" and len(set(settings)) == len(settings) == 13
    assert all(0 <= run["score"] <= 1 for row in found for run in row["runs"])
    (tmp_path / "rows.json").write_text(json.dumps([*found, {**found[0], "images": 16}]))
    again, printed = measured("defaults.py", tmp_path, *flags, "8")
    assert again[:13] == found and [row["settings"] for row in again[14:]] == ["former"]
    assert "| images | 8 | 0." in printed and "| images | 16 | 0." in printed


def test_a_part_of_the_data_has_the_first_images_and_all_of_the_other_splits(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from defaults import first_images

    for name in ("folders", "table"):
        (tmp_path / name).mkdir()
    part = first_images(classes_of(tmp_path / "images"), 6, tmp_path / "folders")
    kept = {path.parent.name: set() for path in part.glob("train/*/*")}
    for path in part.glob("train/*/*"):
        kept[path.parent.name].add(path.name)
    assert kept == {"cat": {"0.png", "10.png", "12.png"}, "dog": {"1.png", "11.png", "13.png"}}
    assert len(list(part.glob("test/*/*"))) == 8
    table = first_images(table_of(tmp_path, 20), 5, tmp_path / "table")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 5 + ["val"] * 4
    assert all((table.parent / row["filename"]).is_file() for row in rows)
