"""The commands on parquet files: training, resume, evaluation, packing and --data-info, compared with other data."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from made_classes import make_squares, save_model
from made_data import make_table
from made_hub_data import IMAGE, TEXT, TEXTS, classes, rows, stored, write
from made_shards import png
from small_runs import losses, same, saved, train
from test_pack import evaluated, pack, records, training_pairs

import evaluate
from lib.data import open_sources
from lib.errors import InputError
from lib.evaluation.tasks import DataFlags, Retrieval, RunFlags, Zeroshot

COUNTS = {"train": {"red": 7, "green": 6, "dark grey": 7}, "test": {"red": 3, "green": 2, "dark grey": 3}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def squares(tmp_path) -> Path:
    return make_squares(tmp_path / "squares", COUNTS)


def as_parquet(folders: Path, out: Path, reverse: bool = False) -> Path:
    """The class folders as a parquet file for each split, in the order in which folders are read."""
    for split in COUNTS:
        files = sorted((folders / split).rglob("*.png"), reverse=reverse)
        names = sorted({file.parent.name for file in files})
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        labels = [names.index(file.parent.name) for file in files]
        table = rows(image=(IMAGE, images), label=(classes(*names), labels))
        write(table, out / "data" / f"{split}-00000-of-00001.parquet")
    return out


def test_class_folders_and_parquet_of_the_same_images_train_to_the_same_losses(squares, tmp_path):
    flags = ["--steps=3", "--augment=light", "--save-every=0"]
    folders = train(tmp_path / "folders", *flags, f"--data={squares}", "--eval-every=3")
    parquet = train(tmp_path / "parquet", *flags, f"--data={as_parquet(squares, tmp_path / 'set')}", "--eval-every=3")
    assert len(losses(parquet)) == 3 and losses(parquet) == losses(folders)
    evals = [
        [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
        for run in (folders, parquet)
    ]
    assert [json.loads(line)["eval"] for line in evals[0]] == [json.loads(line)["eval"] for line in evals[1]] != []
    other = as_parquet(squares, tmp_path / "other", reverse=True)
    assert losses(train(tmp_path / "reversed", *flags, f"--data={other}")) != losses(folders)


def test_a_resumed_run_on_parquet_equals_an_unbroken_one(tmp_path):
    images = [{"bytes": png(number) if number != 3 else b"no image", "path": None} for number in range(20)]
    table = rows(image=(IMAGE, images), caption=(TEXTS, [[f"one {n}", f"two {n % 5}"] for n in range(20)]))
    flags = [f"--data={write(table, tmp_path / 'a.parquet')}", "--captions=one", "--augment=light", "--xbm-size=16"]
    whole = train(tmp_path / "whole", *flags, "--steps=4", "--xbm-start=1")
    half = train(tmp_path / "half", *flags, "--steps=2", "--xbm-start=1")
    rest = train(half, *flags, "--steps=4", "--xbm-start=1", "--resume=auto", "--workers=1")
    assert losses(rest) == losses(whole) and len(losses(rest)) == 4
    assert same(saved(rest, 4), saved(whole, 4))
    data = json.loads((rest / "summary.json").read_text())["data"]
    assert data["skipped"] == {"not_an_image": 1} and data["read"] == data["used"] + 1


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def measured(task: type[Retrieval | Zeroshot], model: Path, data: Path | str, **columns: str) -> dict:
    """The figures of a task, without its pictures."""
    running = RunFlags(output_dir=model, workers=0, batch_size=8)
    options = task(model=str(model), data=DataFlags(data=str(data), **columns), run=running)
    return options.measure(torch.device("cpu")).metrics


def test_classes_are_evaluated_as_those_of_folders(squares, model, tmp_path):
    parquet = measured(Zeroshot, model, as_parquet(squares, tmp_path / "set"))
    folders = measured(Zeroshot, model, squares)
    assert parquet.keys() == folders.keys() and sum(row["support"] for row in parquet["per_class"].values()) == 8
    assert all(parquet[name] == folders[name] for name in ("accuracy", "per_class", "confusion"))


def test_captions_are_evaluated_as_those_of_a_table(model, tmp_path):
    names = [f"{number}.png" for number in range(8)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(png(number))
    lines = [["image", "caption"], *([name, f"{word} {name}"] for name in names for word in ("a", "the"))]
    table = measured(Retrieval, model, make_table(tmp_path / "t.csv", lines))
    said = [[f"a {name}", f"the {name}"] for name in names]
    data = rows(left=(IMAGE, stored(*range(8))), right=(IMAGE, stored(*range(8, 16))), said=(TEXTS, said))
    file = write(data, tmp_path / "a.parquet")
    left, right = (measured(Retrieval, model, file, image_column=c, caption_column="said") for c in ("left", "right"))
    assert all(left[way] == table[way] for way in ("image_to_text", "text_to_image"))
    assert right["image_to_text"] != table["image_to_text"]


def test_the_flags_of_columns_are_those_of_the_command(model, tmp_path, capsys):
    data = rows(left=(IMAGE, stored(0)), right=(IMAGE, stored(1)), caption=(TEXT, ["a"]))
    common = [f"--model={model}", f"--output-dir={tmp_path / 'out'}"]
    assert evaluate.main(["retrieval", f"--data={write(data, tmp_path / 'a.parquet')}", *common]) == 2
    assert "several columns of images" in capsys.readouterr().err
    assert evaluate.main(["retrieval", f"--data={tmp_path / 'a.parquet'}", "--image-column=middle", *common]) == 2
    assert "--image-column middle is no column of images" in capsys.readouterr().err
    assert evaluate.main(["zeroshot", "--data=digits", "--caption-column=left", *common]) == 2
    assert "--caption-column left is for tables and data sets of the hub, not digits" in capsys.readouterr().err


def test_parquet_is_the_same_data_after_packing(squares, tmp_path, capsys):
    images = [*stored(0, 1, None, 3), {"bytes": b"no image", "path": None}, *stored(5)]
    texts = [["a", None, "c"], [], ["d"], [""], ["e"], ["f"]]
    group = [None, None, None, None, None, "pair"]
    data = rows(image=(IMAGE, images), captions=(TEXTS, texts), group=(TEXT, group))
    captions = write(data, tmp_path / "captions" / "train.parquet").parent
    held_out = rows(image=(IMAGE, stored(8, 9)), captions=(TEXTS, [["g"], ["h", "i"]]), group=(TEXT, [None, None]))
    write(held_out, captions / "test.parquet")
    out = pack(captions, tmp_path / "packed", "--shard-size=2")
    bad = {pair for pair in training_pairs(captions, "all") if pair[2] == ("e",)}
    assert len(bad) == 1 and training_pairs(out, "all") == training_pairs(captions, "all") - bad
    assert evaluated(out, "test") == evaluated(captions, "test")
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in skipped} == {
        ("train/0#1", "empty_caption"), ("train/1", "no_text"), ("train/2", "missing"), ("train/3#0", "empty_caption"),
        ("train/4", "not_an_image"),
    }  # fmt: skip
    assert {record["key"]: record.get("group") for record in records(out, "train")} == {
        "train/0": None,
        "train/5": "pair",
    }
    parquet = as_parquet(squares, tmp_path / "set")
    out = pack(parquet, tmp_path / "classes")
    assert training_pairs(out, "all") == training_pairs(parquet, "all")
    assert evaluated(out, "test") == evaluated(parquet, "test")
    with pytest.raises(InputError, match="--caption-column x is for tables"):
        pack(squares, tmp_path / "refused", "--caption-column=x")


def test_data_info_of_parquet_says_what_lies_in_it(tmp_path, capsys):
    images = [*stored(0, 1), {"bytes": b"no image", "path": None}, None]
    data = rows(image=(IMAGE, images), label=(classes("cat", "dog"), [0, 1, 1, 0]))
    write(data, tmp_path / "set" / "train.parquet")
    shutil.copy(tmp_path / "set" / "train.parquet", tmp_path / "set" / "other.parquet")
    train(tmp_path / "out", f"--data={tmp_path / 'set'}", "--data-info")
    info = json.loads((tmp_path / "out" / "data_info.json").read_text())["training"]
    assert info["classes"] == {"cat": 1, "dog": 2} and info["left_out"]["missing"] == {"count": 1, "first": ["train/3"]}
    headers = info["image_headers"]
    assert headers["formats"] == {"PNG": 2} and headers["unreadable"] == 1 and headers["width"]["max"] == 7
    assert "without the split other" in open_sources(str(tmp_path / "set"), None, None)[0].description
