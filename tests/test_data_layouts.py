"""Class folders, imagefolders and tables of classes give the same training, and no layout is mistaken for another."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_data import make_images, make_table, texts_by_image
from small_runs import losses, train

import evaluate
from lib.data import open_evaluation, open_sources
from lib.data.find_images import OUTPUTS
from lib.data.pack.__main__ import main as pack
from lib.errors import InputError
from lib.evaluation.origin import run_of
from lib.runs.reporter import CONFIG, METRICS

CLASSES = ("ant", "big dog", "cow", "eel")


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_lines(path: Path, records: list[dict]) -> Path:
    return put(path, "".join(json.dumps(record) + "\n" for record in records))


def skips(source) -> dict[str, str]:
    return dict(source.skipped)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Twenty pictures in class folders."""
    folder = tmp_path / "folders"
    make_images(folder, *(f"{name.replace(' ', '_')}/{number}.png" for name in CLASSES for number in range(5)))
    return folder


# The same pictures in three layouts


def as_imagefolder(pictures: Path, folder: Path, record) -> Path:
    """The same pictures in one folder, in the same order; `record` makes a row's other columns of the class's name."""
    rows, folder = [], folder / "train"
    folder.mkdir(parents=True)
    for file in sorted(pictures.rglob("*.png")):
        name = f"{file.parent.name}_{file.name}"
        (folder / name).write_bytes(file.read_bytes())
        rows.append({"file_name": name, **record(file.parent.name.replace("_", " "))})
    write_lines(folder / "metadata.jsonl", rows)
    return folder.parent


def test_three_layouts_of_the_same_pictures_train_to_the_same_losses(pictures, tmp_path):
    prompts = put(tmp_path / "prompts.yaml", '- "a picture of {}"\n')
    labelled = as_imagefolder(pictures, tmp_path / "labelled", lambda name: {"label": name})
    captioned = as_imagefolder(
        pictures, tmp_path / "captioned", lambda name: {"text": f"a picture of {name}", "group": name, "width": 8}
    )
    other = as_imagefolder(pictures, tmp_path / "other", lambda name: {"text": f"a picture of {name}"})
    found = {
        folder: losses(train(tmp_path / f"run_{folder.name}", f"--data={folder}", *flags))
        for folder, flags in (
            (pictures, [f"--prompts={prompts}"]),
            (labelled, [f"--prompts={prompts}"]),
            (captioned, []),
            (other, []),
        )
    }
    assert found[pictures] == found[labelled] == found[captioned] and len(found[pictures]) == 2
    assert found[other] != found[pictures], "without groups, pictures of one class are negatives of each other"


# Imagefolder


def test_an_imagefolder_has_the_splits_of_its_folders_and_counts_what_no_row_names(tmp_path):
    make_images(tmp_path, "train/1.png", "train/sub/2.png", "train/3.png", "valid/4.png", "test/5.png", "loose.png")
    first = {"file_name": "1.png", "text": ["one", "uno"], "group": "a", "width": 8}
    write_lines(tmp_path / "train" / "metadata.jsonl", [first, {"file_name": "sub/2.png", "text": "two"}])
    make_table(tmp_path / "valid" / "metadata.csv", [["file_name", "caption"], ["4.png", "four"], ["9.png", "nine"]])
    source, validation = open_sources(str(tmp_path), None, None)
    assert texts_by_image(source) == {"train/1.png": ["one", "uno"], "train/sub/2.png": ["two"]}
    assert skips(source) == {"train/3.png": "no_row", "test/5.png": "no_row", "loose.png": "no_row"}
    assert validation.captions == ["four"] and skips(validation) == {"valid/9.png": "missing"}
    assert open_sources(f"imagefolder:{tmp_path}", None, None)[0].size == 3
    with pytest.raises(InputError, match="--image-root .* images next to them; leave it out"):
        open_sources(str(tmp_path), None, None, image_root=str(tmp_path))


def test_metadata_of_the_root_take_the_split_from_the_path_or_from_a_column(tmp_path):
    make_images(tmp_path, "train/1.png", "dev/2.png", "3.png")
    rows = [["file_name", "text"], ["train/1.png", "one"], ["dev/2.png", "two"], ["3.png", "three"]]
    make_table(tmp_path / "metadata.csv", rows)
    source, validation = open_sources(str(tmp_path), None, None)
    assert source.texts == ["one"] and skips(source) == {"3.png": "no_split"} and validation.captions == ["two"]
    splits = ["split", "test", "train", "train"]
    make_table(tmp_path / "metadata.csv", [[*row, split] for row, split in zip(rows, splits, strict=True)])
    source, validation = open_sources(str(tmp_path), None, None)
    assert source.texts == ["two", "three"] and validation.captions == ["one"]


def test_metadata_that_cannot_be_read_together_are_refused(tmp_path):
    make_images(tmp_path, "train/1.png", "test/2.png")
    write_lines(tmp_path / "train" / "metadata.jsonl", [{"file_name": "1.png", "text": "one"}])
    write_lines(tmp_path / "test" / "metadata.jsonl", [{"file_name": "2.png", "label": "two"}])
    with pytest.raises(InputError, match="one file of metadata has captions and another classes"):
        open_sources(str(tmp_path), None, None)
    make_table(tmp_path / "train" / "metadata.csv", [["file_name", "text"], ["1.png", "one"]])
    with pytest.raises(InputError, match=r"train holds metadata.csv and metadata.jsonl; remove one"):
        open_sources(str(tmp_path), None, None)
    for file in tmp_path.rglob("metadata.*"):
        file.unlink()
    put(tmp_path / "train" / "metadata.parquet", "")
    with pytest.raises(InputError, match="give parquet:.*train/metadata.parquet --image-root .*train"):
        open_sources(str(tmp_path), None, None)


def test_metadata_of_another_meaning_do_not_hide_class_folders(pictures):
    make_table(pictures / "metadata.csv", [["id", "file_name"], ["1", "ant/1.png"]])
    source, _ = open_sources(str(pictures), None, None)
    assert source.classes == ("ant", "big dog", "cow", "eel")
    assert source.description.startswith("class folders (metadata.csv not read)")


# Class folders


def test_folders_that_read_as_one_name_are_one_class(tmp_path):
    make_images(tmp_path, "a_b/1.png", "a b/2.png", "A b/3.png", "c/4.png", "a_b/sub/5.png")
    source, _ = open_sources(str(tmp_path), None, None)
    assert source.classes == ("A b", "a b", "c") and "a b and a_b are one class" in source.description
    group = dict(zip(source.images.keys, source.group.tolist(), strict=True))
    assert group["a_b/1.png"] == group["a b/2.png"] != group["A b/3.png"]
    assert skips(source) == {"a_b/sub/5.png": "in_subfolder"}
    labels = open_evaluation(str(tmp_path), "auto", None).labels.tolist()
    assert labels == [0, 1, 1, 2]


def test_several_folders_of_one_split_are_all_read(tmp_path):
    make_images(tmp_path, "Train/cat/1.png", "val/cat/2.png", "valid/dog/3.png", "extra/cat/4.png", "val/5.png")
    source, validation = open_sources(str(tmp_path), None, None)
    assert source.size == 1 and validation.image_keys == ["val/cat/2.png", "valid/dog/3.png"]
    assert skips(source) == {"extra/cat/4.png": "no_split"} and skips(validation) == {"val/5.png": "no_class"}


def test_folders_that_are_links_are_classes_and_circles_end(tmp_path):
    make_images(tmp_path / "elsewhere", "dog/1.png", "dog/2.png")
    make_images(tmp_path / "data", "cat/3.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "data" / "all").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "up").symlink_to("..")
    source, _ = open_sources(str(tmp_path / "data"), None, None)
    assert source.images.keys == ["cat/3.png", "dog/1.png", "dog/2.png"] and source.skipped == ()


def test_what_is_no_class_folder_is_refused_with_what_to_give(tmp_path):
    make_images(tmp_path / "deep", "photos/cat/1.png", "photos/dog/2.png")
    make_images(tmp_path / "split", "photos/train/cat/1.png")
    make_images(tmp_path / "names", "train/1.png", "test/2.png")
    make_images(tmp_path / "table", "train/1.png", "val/2.png")
    make_table(tmp_path / "table" / "captions.csv", [["image", "caption"], ["train/1.png", "one"]])
    cases = {
        "deep": "its images lie deeper, as in photos/cat; give .*deep/photos",
        "split": "its images lie deeper, as in photos/train/cat; give .*split/photos$",
        "names": "has images in test/ and train/ and no classes; class folders in them are needed .* or metadata.csv",
        "table": "holds images and a table of their captions; give .*table/captions.csv, or folders:",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            open_sources(str(tmp_path / name), None, None)
    with pytest.raises(InputError, match=r"images in train/ and val/ and no classes; .* give .*captions.csv"):
        open_sources(f"folders:{tmp_path / 'table'}", None, None)
    assert open_sources(str(tmp_path / "deep" / "photos"), None, None)[0].classes == ("cat", "dog")
    make_images(tmp_path / "names", "dog/3.png")  # a train is a class too
    assert open_sources(str(tmp_path / "names"), None, None)[0].classes == ("dog", "test", "train")


def test_a_folder_that_cannot_be_read_is_said_in_one_line(pictures, monkeypatch):
    def closed(path="."):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match="--data .*folders cannot be read: Permission denied"):
        open_sources(str(pictures), None, None)


# Outputs of ours


def test_results_are_not_written_into_folders_of_pictures(pictures, tmp_path, capsys):
    message = "--output-dir .*runs/a lies in --data .*folders, where its pictures would become data; name a folder"
    with pytest.raises(InputError, match=message):
        train(pictures / "runs" / "a", f"--data={pictures}")
    with pytest.raises(InputError, match=message):
        train(pictures / "runs" / "a", f"--data={pictures}", "--data-info")
    out = pictures / "ant" / "report"
    assert evaluate.main(["zeroshot", f"--model={tmp_path}", f"--data={pictures}", f"--output-dir={out}"]) == 2
    assert f"--output-dir {out} lies in --data {pictures}" in capsys.readouterr().err
    with pytest.raises(InputError, match="--out .*packed lies in SOURCE"):
        pack([str(pictures), f"--out={pictures / 'packed'}"])
    labelled = as_imagefolder(pictures, tmp_path / "labelled", lambda name: {"label": name})
    with pytest.raises(InputError, match="--output-dir .* lies in --data .*labelled"):
        train(labelled / "run", f"--data={labelled}")


def test_a_run_among_the_pictures_is_one_thing_that_is_skipped(pictures, tmp_path):
    run = train(tmp_path / "run", f"--data={pictures}", "--eval-every=1", f"--val-data={pictures}")
    assert run_of(str(run)) == run and {CONFIG, METRICS, "loss_curve.png"} <= {file.name for file in run.iterdir()}
    assert any({CONFIG, METRICS} == marks for marks in OUTPUTS)
    run.rename(pictures / "run")
    source, _ = open_sources(str(pictures), None, None)
    assert source.size == 20 and source.classes == CLASSES and skips(source) == {"run": "a_run"}


# Names of classes


def test_class_names_hold_in_training_and_in_evaluation(pictures, tmp_path, capsys):
    names = put(tmp_path / "names.yaml", yaml.safe_dump({"ant": "tiny ant", "cow": "milk cow"}))
    flags = [f"--data={pictures}", "--hold-out=0.2", "--eval-every=1"]
    run = train(tmp_path / "run", *flags, f"--class-names={names}")
    assert f"--class-names {names}" in capsys.readouterr().out.partition("next: ")[2]
    assert yaml.safe_load((run / CONFIG).read_text())["class_names"] == str(names)
    assert losses(run) != losses(train(tmp_path / "plain", *flags))
    renamed = pictures.rename(tmp_path / "renamed")
    for old, new in (("ant", "tiny_ant"), ("cow", "milk_cow")):
        (renamed / old).rename(renamed / new)
    source, validation = open_sources(str(renamed), None, None, held_out_fraction=0.2)
    assert source.classes == ("big dog", "eel", "milk cow", "tiny ant")
    for old, new in (("ant", "tiny_ant"), ("cow", "milk_cow")):
        (renamed / new).rename(renamed / old)
    named, checked = open_sources(str(renamed), None, None, held_out_fraction=0.2, class_names=names)
    assert named.classes == checked.classes == ("tiny ant", "big dog", "milk cow", "eel")
    assert named.texts[named.first_text[0]] == "a photo of tiny ant"
    assert set(named.group) == set(source.group) == set(checked.group) == set(validation.group)


def test_class_names_without_classes_are_refused(pictures, tmp_path):
    names = put(tmp_path / "names.yaml", "- only one\n")
    with pytest.raises(InputError, match="lists 1 names for 4 classes"):
        open_sources(str(pictures), None, None, class_names=names)
    table = make_table(pictures / "t.csv", [["image", "caption"], ["ant/0.png", "x"]])
    with pytest.raises(InputError, match="--class-names .* goes with class names, and .*t.csv has captions; leave it"):
        open_sources(table, None, None, class_names=names)


def test_a_table_of_classes_is_read_as_labelled_images(pictures, tmp_path):
    rows = [["image", "category", "split"], ["cow/0.png", "cow", "train"], ["ant/0.png", "big_ant", "train"]]
    rows += [["ant/1.png", "", "train"], ["ant/0.png", "cow", "train"], ["ant/9.png", "cow", "train"]]
    rows += [["cow/1.png", "cow", "val"], ["eel/1.png", "eel", "val"], ["eel/2.png", "cow", "trian"]]
    source, validation = open_sources(make_table(pictures / "t.csv", rows), None, "simple")
    assert source.classes == validation.classes == ("big ant", "cow", "eel")
    assert [source.texts[first] for first in source.first_text] == ["a photo of cow", "a photo of big ant"]
    assert sorted(source.skipped) == [
        ("ant/0.png", "repeated_name"), ("ant/1.png", "no_text"), ("ant/9.png", "missing"), ("t.csv:9", "unknown_split")
    ]  # fmt: skip
    assert validation.image_keys == ["cow/1.png", "eel/1.png"] and validation.labels.tolist() == [1, 2]
    kept, held = open_sources(str(make_table(pictures / "u.csv", [row[:2] for row in rows[:3]])), None, None)
    assert kept.size == 2 and held is None


def test_numbers_as_classes_need_names(pictures, tmp_path):
    files = sorted(file.relative_to(pictures).as_posix() for file in pictures.rglob("*.png"))
    table = make_table(pictures / "t.csv", [["image", "label"], *([f, str(n % 11)] for n, f in enumerate(files))])
    with pytest.raises(InputError, match="has numbers for classes .0, 1, 2, .* give --class-names FILE"):
        open_sources(table, None, None)
    names = put(tmp_path / "names.yaml", yaml.safe_dump([f"class {n}" for n in range(11)]))
    source, _ = open_sources(table, None, None, class_names=names)
    assert source.classes == tuple(f"class {n}" for n in range(11)), "in the order of the numbers, not of their digits"
    assert (source.first_text // len(source.templates)).tolist() == [n % 11 for n in range(20)]
    assert np.unique(open_evaluation(table, "auto", None).labels).tolist() == [*range(11)]
