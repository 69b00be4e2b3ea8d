"""Data that looks right and cannot be trained on: one line that names the flag, the place and the remedy."""

import gzip
import json
from pathlib import Path

import pytest
from made_shards import captioned, make_tar
from PIL import Image

from lib.data import open_sources
from lib.data.fetcher import Fetcher
from lib.errors import InputError
from lib.towers.processing import Processing


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


NO_NAMES = {
    "too long": "n" * 300,
    "too long a path": "/".join(["folder"] * 1000),
    "not UTF-8": "caf\udce9",
    "half a letter": "\ud83d",
    "a NUL": "a\0b",
}
"""Names that no file has, or that cannot be printed as they are."""


@pytest.mark.parametrize("name", NO_NAMES.values(), ids=NO_NAMES)
def test_a_flag_with_a_name_that_no_file_has_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "1.png")
    table = tmp_path / "a.csv"
    table.write_text("image,caption\n1.png,red\n")
    endings = ("", ".csv", ".json", ".parquet", ".tar", "-{0..3}.tar", "-*.tar", "/a.csv")
    prefixes = ("folders", "imagefolder", "table", "coco", "flickr", "karpathy", "shards", "parquet", "arrow")
    for data in (*(name + ending for ending in endings), *(f"{prefix}:{name}" for prefix in prefixes)):
        with pytest.raises(InputError, match="^--val-data .*(is not there|too long|there is no )"):
            open_sources(str(table), data, None)
    with pytest.raises(InputError, match="^--image-root .* is not a folder"):
        open_sources(str(table), None, None, image_root=name)
    if name != NO_NAMES["not UTF-8"]:  # a folder may be called so
        make_tar(tmp_path / "plain.tar", captioned(range(2)))
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
        with pytest.raises(InputError, match="^--cache-dir .* cannot be written .*; name a folder that can"):
            open_sources(str(tmp_path / "a.tar.gz"), None, None, fetcher=Fetcher(Path(name), 0))


@pytest.mark.parametrize("kind", ["too long", "too long a path", "not UTF-8", "half a letter"])
def test_a_row_with_a_name_that_no_file_has_costs_itself_alone(kind, tmp_path):
    picture(tmp_path / "1.png")
    name = NO_NAMES[kind]
    names = ["1.png", f"{name}.png", f"{name}/1.png"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"image": each, "caption": "red"}) + "\n" for each in names))
    images = [{"id": number, "file_name": each} for number, each in enumerate(names)]
    captions = [{"image_id": number, "caption": "red"} for number in range(3)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": captions}))
    sentences = [{"raw": "red"}]
    karpathy = [{"filename": each, "split": "train", "sentences": sentences} for each in names]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": karpathy}))
    reason = "missing" if name.isascii() else "not_utf8"
    for data in (f"{tmp_path}/a.jsonl", f"coco:{tmp_path}/coco.json", f"karpathy:{tmp_path}/dataset.json"):
        source, _ = open_sources(data, None, None)
        assert source.size == 1 and [why for _, why in source.skipped] == [reason] * 2


def test_patterns_and_commands_may_be_longer_than_a_path(tmp_path):
    make_tar(tmp_path / "a.tar", captioned(range(3)))
    numbers = ",".join(["a"] * 3000)
    assert open_sources(f"{tmp_path}/{{{numbers}}}.tar", None, None)[0].size == 3
    fetcher = Fetcher(tmp_path / "cache", 0, allow_pipe=True)
    source, _ = open_sources(f"pipe:cat {' ' * 5000}{tmp_path}/a.tar", None, None, fetcher=fetcher)
    assert [len(items) for _, items in source.read(0)] == [1, 1, 1]


def test_shards_and_folders_whose_names_are_not_utf8(tmp_path):
    """A folder above the data may be called anything; the name of a shard is part of its samples' keys."""
    folder = tmp_path / NO_NAMES["not UTF-8"]
    folder.mkdir()
    for name in ("a.tar", "b.tar", f"{NO_NAMES['not UTF-8']}.tar"):
        make_tar(folder / name, captioned(range(3)))
    assert open_sources(str(folder / "[ab].tar"), None, None)[0].size == 6
    with pytest.raises(InputError, match="the file's name is not UTF-8.*; rename the file"):
        open_sources(str(folder / f"{NO_NAMES['not UTF-8']}.tar"), None, None)
    source, _ = open_sources(str(folder / "*.tar"), None, None)
    assert source.size == 6
    assert source.unusable == tuple((ascii(f"{NO_NAMES['not UTF-8']}.tar/{n:04d}"), "not_utf8") for n in range(3))


def test_a_model_folder_that_names_no_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no config.json there that names a model type"):
        Processing.from_pretrained(tmp_path)
