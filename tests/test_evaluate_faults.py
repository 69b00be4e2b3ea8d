"""Faulty inputs of every task: an error of one line, or a correct result without the missing samples."""

import json
import shutil
from pathlib import Path

import pytest
from made_classes import COLOURS, make_squares, save_model
from made_data import make_images, make_table
from safetensors.torch import load_file, save_file

import evaluate
from lib.evaluation import probe_classifiers

CLASS_TASKS = ("zeroshot", "probe", "agnostic", "compare")
QUICK = {"probe": ["--shots"], "agnostic": ["--temperatures", "0.1"], "compare": ["--resamples", "5"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quick_mlp(monkeypatch):
    monkeypatch.setattr(probe_classifiers, "MLP_STEPS", 10)


def run(task: str, model: Path, data: Path, out: Path) -> int:
    """One task on data; compare has the model and a copy of it."""
    models = [f"--model={model}"]
    if task == "compare":
        twin = out.parent / "twin"
        if not twin.exists():
            shutil.copytree(model, twin)
        models = ["--models", str(model), str(twin)]
    flags = [*models, f"--data={data}", f"--output-dir={out}", f"--cache-dir={out.parent / 'cache'}", "--workers=0"]
    return evaluate.main([task, *flags, *QUICK.get(task, [])])


def figures(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def error_of(task: str, model: Path, data: Path, out: Path, capsys) -> str:
    """The one line that a task prints instead of a result."""
    capsys.readouterr()
    assert run(task, model, data, out) == 2
    told = capsys.readouterr().err
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in told and not (out / "metrics.json").exists()
    return errors[0]


# Classes


def test_data_without_classes_names_the_task_for_it(model, tmp_path, capsys):
    make_images(tmp_path, "a.png", "b.png")
    table = Path(make_table(tmp_path / "captions.csv", [["image", "caption"], ["a.png", "red"], ["b.png", "blue"]]))
    for task in ("zeroshot", "probe", "agnostic"):
        assert "run `evaluate.py retrieval` on it instead" in error_of(task, model, table, tmp_path / task, capsys)


def test_data_without_captions_names_the_task_for_it(model, tmp_path, capsys):
    data = make_squares(tmp_path / "data", {"test": {"red": 2, "blue": 2}})
    assert "run `evaluate.py zeroshot` on it instead" in error_of("retrieval", model, data, tmp_path / "out", capsys)


@pytest.mark.parametrize("task", CLASS_TASKS)
def test_a_class_without_test_images_counts_for_nothing(model, tmp_path, capsys, task):
    train = dict.fromkeys(COLOURS, 4)
    data = make_squares(tmp_path / "data", {"train": train, "test": {"red": 3, "green": 2, "blue": 2}})
    out = tmp_path / "out"
    assert run(task, model, data, out) == 0
    found = figures(out)
    if task == "compare":
        assert len(found["models"]) == 2
        assert all(support(each, "dark grey") == 0 for each in found["models"].values())
        return
    if task == "agnostic":
        assert found["0.1"]["accuracy"] > 0.5 and "classes without test images: dark grey" in told(capsys)
        return
    found = found["linear_svm"] if task == "probe" else found
    assert found["per_class"]["dark grey"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    # The mean runs over the classes that occur or are predicted; here the wrong class may be predicted too.
    predicted = [column for column in range(4) if sum(row[column] for row in found["confusion"])]
    occurring = [name for place, name in enumerate(found["per_class"]) if place in predicted or support(found, name)]
    mean = sum(found["per_class"][name]["f1"] for name in occurring) / len(occurring)
    assert found["macro_f1"] == pytest.approx(mean)


def support(found: dict, name: str) -> int:
    return found["per_class"][name]["support"]


def told(capsys) -> str:
    return capsys.readouterr().out


def test_a_class_without_training_images_is_never_answered(model, tmp_path, capsys):
    train = {"red": 6, "green": 6}
    data = make_squares(tmp_path / "data", {"train": train, "test": {"red": 3, "green": 3, "blue": 3}}, noise=20)
    assert run("probe", model, data, tmp_path / "out") == 0
    found = figures(tmp_path / "out")["linear_svm"]
    assert found["per_class"]["blue"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 3}
    assert found["accuracy"] == pytest.approx(6 / 9)
    assert "classes without training images: blue" in told(capsys)


def test_one_class_is_always_right_by_prompts_and_cannot_be_learnt(model, tmp_path, capsys):
    data = make_squares(tmp_path / "data", {"train": {"red": 4}, "test": {"red": 3}})
    assert run("zeroshot", model, data, tmp_path / "zeroshot") == 0
    found = figures(tmp_path / "zeroshot")
    assert found["accuracy"] == found["top5"] == found["macro_f1"] == 1.0 and found["confusion"] == [[3]]
    for task in ("probe", "agnostic"):
        error = error_of(task, model, data, tmp_path / task, capsys)
        assert "one class, 'red'" in error and "at least two" in error


def test_too_few_images_to_divide_are_told(model, tmp_path, capsys):
    data = make_squares(tmp_path / "data", {"": {"red": 1, "blue": 1}})
    error = error_of("probe", model, data, tmp_path / "out", capsys)
    assert "leaves no images" in error and "more images per class" in error


# Captions


def test_captions_whose_images_are_away_are_left_out_and_counted(model, tmp_path, capsys):
    make_images(tmp_path, "a.png", "b.png", "c.png")
    rows = [["image", "caption"], ["a.png", "red"], ["gone.png", "blue"], ["b.png", "green"], ["c.png", "dark grey"]]
    table = Path(make_table(tmp_path / "captions.csv", rows))
    assert run("retrieval", model, table, tmp_path / "out") == 0
    assert "images: 3" in (out := told(capsys)) and "missing 1" in out and "captions: 3" in out
    rest = Path(make_table(tmp_path / "gone.csv", [rows[0], rows[2]]))
    assert "gone.csv" in error_of("retrieval", model, rest, tmp_path / "none", capsys)


def test_images_without_captions_are_left_out_and_counted(model, tmp_path, capsys):
    make_images(tmp_path, "a.png", "b.png", "c.png")
    rows = [["image", "caption"], ["a.png", "red"], ["b.png", ""], ["c.png", "blue"]]
    table = Path(make_table(tmp_path / "captions.csv", rows))
    assert run("retrieval", model, table, tmp_path / "out") == 0
    assert "images: 2" in (out := told(capsys)) and "empty_caption 1" in out
    rest = Path(make_table(tmp_path / "none.csv", [rows[0], rows[2]]))
    assert "none.csv" in error_of("retrieval", model, rest, tmp_path / "none", capsys)


# All tasks


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_damaged_weights_are_told_by_every_task(model, tmp_path, capsys, tower):
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (file,) = (damaged / "export").glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if tower in name and name.endswith("weight"))
    weights[name][:] = float("nan")
    save_file(weights, file, {"format": "pt"})
    classes = make_squares(tmp_path / "data", {"train": {"red": 3, "blue": 3}, "test": {"red": 2, "blue": 2}})
    make_images(tmp_path, "a.png", "b.png")
    captions = Path(make_table(tmp_path / "captions.csv", [["image", "caption"], ["a.png", "red"], ["b.png", "blue"]]))
    for task in (*CLASS_TASKS, "retrieval"):
        if task == "probe" and tower == "text":
            continue  # it embeds no text
        data = captions if task == "retrieval" else classes
        error = error_of(task, damaged, data, tmp_path / "out" / task, capsys)
        assert "embeddings are NaN or infinite" in error and "earlier checkpoint" in error


def test_an_empty_data_set_is_told_by_every_task(model, tmp_path, capsys):
    empty, folders, table = tmp_path / "empty", tmp_path / "folders", tmp_path / "empty.csv"
    empty.mkdir()
    (folders / "test" / "red").mkdir(parents=True)
    table.write_text("image,caption\n")
    for task in (*CLASS_TASKS, "retrieval"):
        for data in (empty, folders, table):
            assert str(data) in error_of(task, model, data, tmp_path / "out", capsys)


def test_images_that_cannot_be_read_are_told_by_every_task(model, tmp_path, capsys):
    data = make_squares(tmp_path / "data", {"train": {"red": 2, "blue": 2}, "test": {"red": 2, "blue": 2}})
    for image in data.rglob("*.png"):
        image.write_bytes(image.read_bytes()[:60])
    for task in CLASS_TASKS:
        error = error_of(task, model, data, tmp_path / task, capsys)
        assert "none of the 4 images" in error and "truncated 4" in error
