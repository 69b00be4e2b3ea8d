"""Data that looks right and cannot be trained on: one line that names the flag, the place and the remedy."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lib.data import open_sources
from lib.errors import InputError
from lib.processing import Processing


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def only_held_out_folders(folder: Path) -> list[str]:
    for name in ("cat", "dog"):
        picture(folder / "val" / name / "1.png")
    return [str(folder)]


def index_of_another_version(folder: Path) -> list[str]:
    (folder / "index.json").write_text(json.dumps({"version": 99, "shards": {}}))
    (folder / "a.tar").write_bytes(bytes(10240))
    return [str(folder)]


@pytest.mark.parametrize(
    "make, words",
    [
        (only_held_out_folders, "has no split for training, only val"),
        (index_of_another_version, "is of version 99, read here is"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_in_one_line(make, words, tmp_path):
    with pytest.raises(InputError) as error:
        open_sources(make(tmp_path), None, None)
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_image_of_karpathys_file_without_a_name_is_counted(tmp_path):
    picture(tmp_path / "1.png")
    good = {"filename": "1.png", "split": "train", "sentences": [{"raw": "a red square"}]}
    file = tmp_path / "dataset_flickr8k.json"
    file.write_text(json.dumps({"images": [good, {"split": "train"}, "text"]}))
    source, _ = open_sources(f"karpathy:{file}", None, None, image_root=str(tmp_path))
    assert source.size == 1
    assert [reason for _, reason in source.skipped] == ["malformed_row", "malformed_row"]


def test_a_model_folder_that_names_no_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no config.json there that names a model type"):
        Processing.from_pretrained(tmp_path)
