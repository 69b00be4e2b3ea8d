"""--data-info prints the counts that a count by hand gives, and writes a picture of pairs."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from made_data import make_images, make_table
from PIL import Image

from lib.data import open_sources
from lib.data.info import data_info
from lib.data.shard_source import ShardSource


def info_of(data, folder: Path, **options) -> dict:
    source, validation = open_sources(data, options.pop("val_data", None), None, **options)
    data_info(source, validation, folder)
    with Image.open(folder / "data_info.png") as picture:
        picture.load()
        assert picture.width > 1000
    return json.loads((folder / "data_info.json").read_text())


def save(path: Path, width: int, height: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height)).save(path)


@pytest.mark.parametrize("captions", ["all", "one"])
def test_captions_are_counted_as_by_hand(tmp_path, capsys, captions):
    save(tmp_path / "1.jpg", 10, 20)
    save(tmp_path / "2.png", 30, 40, "L")
    save(tmp_path / "3.jpg", 50, 90)
    (tmp_path / "4.jpg").write_text("no image")
    rows = [["image", "caption", "split"], ["1.jpg", "a b c", "train"], ["1.jpg", "a", "train"], ["1.jpg", "", "train"]]
    rows += [["2.png", "a", "train"], ["3.jpg", "a b c d e f", "train"], ["4.jpg", "x", "train"]]
    rows += [[f"gone{number}.jpg", "x", "train"] for number in range(5)]
    rows += [["1.jpg", "held out", "val"], ["1.jpg", "held out", "val"]]
    table = make_table(tmp_path / "t.csv", rows)
    info = info_of(table, tmp_path / "out", captions=captions)
    training = info["training"]
    assert (training["pairs"], training["images"], training["distinct_texts"]) == (5 if captions == "all" else 4, 4, 4)
    assert training["captions_per_image"] == {"min": 1, "mean": 1.25, "max": 2}
    assert training["words_per_caption"] == {"min": 1, "mean": 2.4, "max": 6}
    assert training["image_headers"] == {
        "sampled": 4,
        "width": {"min": 10, "median": 30, "max": 50},
        "height": {"min": 20, "median": 40, "max": 90},
        "formats": {"JPEG": 2, "PNG": 1},
        "modes": {"RGB": 2, "L": 1},
        "unreadable": 1,
    }
    assert training["left_out"]["missing"] == {"count": 5, "first": ["gone0.jpg", "gone1.jpg", "gone2.jpg"]}
    assert training["left_out"].get("empty_caption", {"count": 0})["count"] == (captions == "all")
    held_out = info["held_out"]
    assert (held_out["images"], held_out["captions"], held_out["distinct_texts"]) == (1, 2, 1)
    printed = capsys.readouterr().out
    assert "left out: 5 missing (gone0.jpg, gone1.jpg, gone2.jpg, …)" in printed
    assert "width: 10 to 50, median 30" in printed and "held out   tmp" not in printed.split("written")[1]


def test_classes_are_counted_and_many_are_cut(tmp_path, capsys):
    names = [f"train/class_{number:02d}/{image}.jpg" for number in range(40) for image in range(1 + number % 3)]
    make_images(tmp_path, *names, "test/class_00/x.jpg")
    info = info_of(str(tmp_path), tmp_path / "out")
    assert info["training"]["classes"] == {f"class {number:02d}": 1 + number % 3 for number in range(40)}
    assert info["held_out"]["classes"] == {f"class {number:02d}": int(number == 0) for number in range(40)}
    lines = capsys.readouterr().out.splitlines()
    of_training = lines[: next(number for number, line in enumerate(lines) if line.startswith("held out"))]
    assert sum("  class " in line for line in of_training) == 28 and any("… 12 more" in line for line in of_training)


def make_tar(path: Path, samples: int, text: str) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            picture = io.BytesIO()
            Image.new("RGB", (16, 12), (number % 256, 0, 0)).save(picture, "JPEG")
            members = {"jpg": picture.getvalue(), "txt": f"{text} {number}".encode()}
            if number == 3:
                del members["jpg"]
            for suffix, content in members.items():
                entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_shards_are_told_from_the_beginnings_of_a_few(tmp_path, monkeypatch):
    for shard in range(6):
        make_tar(tmp_path / f"{shard}.tar", 12, f"shard {shard} text")
    monkeypatch.setattr("lib.data.info.SAMPLES", 20)
    opened, read = [], ShardSource.read
    monkeypatch.setattr(ShardSource, "read", lambda *given: opened.append(given[1]) or read(*given))
    training = info_of(str(tmp_path / "{0..5}.tar"), tmp_path / "out", val_data=str(tmp_path / "5.tar"))["training"]
    assert training["shards"] == 6 and training["looked_at"] == 20
    # Two shards of ten samples each for the numbers, and the same again for the picture.
    assert len(opened) == 4 and len(set(opened)) == 2
    assert training["left_out"]["no_image"]["count"] == 6  # all of them: small local shards are counted when opened
    assert training["words_per_caption"] == {"min": 4, "mean": 4.0, "max": 4}
    assert training["image_headers"]["formats"] == {"JPEG": 18}


def test_a_mixture_is_told_part_by_part(tmp_path):
    make_images(tmp_path / "a", "cat/1.jpg", "dog/2.jpg")
    table = make_table(tmp_path / "t.csv", [["image", "caption"], ["a/cat/1.jpg", "x"]])
    (tmp_path / "a" / "dog" / "2.jpg").write_bytes(b"")
    training = info_of([f"{tmp_path / 'a'}::3", f"{table}::1"], tmp_path / "out")["training"]
    assert [part["weight"] for part in training["parts"]] == [0.75, 0.25]
    assert [part["pairs"] for part in training["parts"]] == [2, 1] and training["pairs"] == 3
    assert training["parts"][0]["classes"] == {"cat": 1, "dog": 1}


def test_a_folder_whose_name_is_not_utf8_is_told(tmp_path):
    make_images(tmp_path / "caf\udce9", "cat/1.jpg", "dog/2.jpg")
    training = info_of(str(tmp_path / "caf\udce9"), tmp_path / "out")["training"]
    assert training["name"] == str(tmp_path / "caf\udce9") and training["classes"] == {"cat": 1, "dog": 1}


def test_the_picture_is_the_same_every_time(tmp_path):
    source, validation = open_sources("digits", None, None)
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        data_info(source, validation, tmp_path / name, seed)
        pictures.append(np.asarray(Image.open(tmp_path / name / "data_info.png").convert("RGB")))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0][60:], pictures[2][60:])
    info = json.loads((tmp_path / "a" / "data_info.json").read_text())
    assert info["training"]["pairs"] == sum(info["training"]["classes"].values()) == 1442
    assert info["held_out"]["images"] == 355 and info["training"]["image_headers"]["formats"] == {"in memory": 200}


@pytest.mark.slow
def test_the_real_sets_are_told(shared, tmp_path, capsys):
    coco = info_of(str(shared / "data" / "coco"), tmp_path / "coco")["training"]
    assert (coco["images"], coco["pairs"], coco["left_out"]["missing"]["count"]) == (128, 641, 4_872)
    assert coco["image_headers"]["sampled"] == 128 and "4,872 missing" in capsys.readouterr().out
    har = info_of(str(shared / "data" / "har"), tmp_path / "har")
    assert set(har["training"]["classes"].values()) == {150} and len(har["held_out"]["classes"]) == 15
