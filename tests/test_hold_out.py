"""--hold-out: half of the images that training leaves out choose the checkpoint, the other half is reported."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_classes import COLOURS, make_squares
from PIL import Image

import evaluate
import train_clip
from lib.data import open_evaluation, open_sources
from lib.data.caption_table import divided_names
from lib.errors import InputError

TRAINING = ["--effective-batch=8", "--chunk-size=4", "--xbm-size=0", "--steps=2", "--workers=0", "--save-every=0"]

SHARES = (0.05, 0.1, 0.25, 0.5)


def picture(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path.name


@pytest.fixture
def pictures(tmp_path) -> Path:
    for number in range(33):
        picture(tmp_path / "pictures" / ("cat", "dog", "sea gull")[number % 3] / f"{number}.png", number)
    return tmp_path / "pictures"


@pytest.fixture
def table(tmp_path) -> Path:
    rows = [
        (picture(tmp_path / f"{number}.png", number), f"caption {n} of {number}") for number in range(10) for n in "ab"
    ]
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filename", "caption"), *rows])
    return tmp_path / "captions.csv"


def test_every_class_gives_its_share_and_no_image_is_in_two_parts(pictures):
    source, validation = open_sources(str(pictures), None, None, held_out_fraction=0.25)
    test = open_evaluation(str(pictures), "auto", None, held_out_fraction=0.25)
    parts = [*source.images.keys, *validation.image_keys, *test.image_keys]
    assert len(parts) == len(set(parts)) == 33 and validation.chooses
    assert (np.bincount(validation.labels).tolist(), np.bincount(test.labels).tolist()) == ([1, 1, 1], [2, 2, 2])
    assert open_evaluation(str(pictures), "val", None, held_out_fraction=0.25).image_keys == validation.image_keys
    assert open_sources(str(pictures), None, None)[1] is None, "without the flag nothing is kept back"


def test_captions_of_an_image_stay_together(table):
    source, validation = open_sources(str(table), None, None, held_out_fraction=0.2)
    test = open_evaluation(str(table), "auto", None, held_out_fraction=0.2)
    for half in (validation, test):
        assert len(half) == 1 and len(half.captions) == 2
    assert len({*validation.image_keys, *test.image_keys, *source.images.keys}) == 10
    assert source.size == 16


def test_a_smaller_part_reports_on_no_image_that_a_larger_one_trained_on_or_chose_by():
    names = [f"{number}.png" for number in range(40)]
    tests = [{name for name, split in divided_names(names, share).items() if split == "test"} for share in SHARES]
    assert [len(test) for test in tests] == [1, 2, 5, 10] and tests[0] < tests[1] < tests[2] < tests[3]
    added = divided_names([*names, "another.png"], 0.25)
    assert sum(added[name] != split for name, split in divided_names(names, 0.25).items()) <= 2
    assert sorted(divided_names(names[:3], 0.1).values()) == ["test", "train", "val"]
    assert sorted(divided_names(names[:2], 0.9).values()) == ["test", "train"]


def test_images_that_make_no_two_halves_are_refused(pictures, tmp_path, capsys):
    for folder in pictures.iterdir():
        for file in sorted(folder.iterdir())[2:]:
            file.unlink()
    flags = [f"--data={pictures}", "--hold-out=0.5"]
    with pytest.raises(InputError, match="--hold-out 0.5 of --data .*two halves.* until a class .* has three; .*--val"):
        train_clip.main([*TRAINING, *flags, f"--output-dir={tmp_path / 'run'}"])
    assert evaluate.main(["zeroshot", "--model=tiny", *flags, f"--output-dir={tmp_path}"]) == 2
    assert "has no images for two halves" in capsys.readouterr().err
    picture(pictures / "cat" / "more.png", 40)
    open_sources(str(pictures), None, None, held_out_fraction=0.5)


def test_the_first_val_split_of_a_mixture_chooses_before_any_test_split(pictures, table):
    _, validation = open_sources(["digits::0.5", f"{pictures}::0.5"], None, None)
    assert validation.name == "digits (test)" and not validation.chooses
    with pytest.raises(InputError, match="--data digits"):
        open_sources(["digits::0.5", f"{pictures}::0.5"], None, None, held_out_fraction=0.25)
    _, validation = open_sources([str(table), str(pictures)], None, None, held_out_fraction=0.25)
    assert validation.captions and validation.chooses
    (pictures.parent / "both").mkdir()
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "cat")):
        (pictures.parent / "both" / split).mkdir(exist_ok=True)
        shutil.copytree(pictures / name, pictures.parent / "both" / split / name)
    _, validation = open_sources(["digits::0.5", f"{pictures.parent / 'both'}::0.5"], None, None)
    assert validation.name == "both (val)" and validation.chooses


def test_data_that_cannot_be_divided_is_refused(pictures):
    with pytest.raises(InputError, match="--hold-out 0.1: --data digits has its splits already|--hold-out 0.1 divides"):
        open_sources("digits", None, None, held_out_fraction=0.1)
    with pytest.raises(InputError, match="--hold-out 1.5 must be between 0 and 1"):
        open_sources(str(pictures), None, None, held_out_fraction=1.5)


def test_a_folder_of_pictures_becomes_a_model_and_a_report_by_the_command_that_training_names(
    pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train_clip.main([*TRAINING, f"--data={pictures}", "--hold-out=0.25", "--eval-every=1", "--output-dir=runs/mine"])
    printed = capsys.readouterr().out
    assert "validation 3 images, 3 classes" in printed
    assert "half of the held-out images; evaluate.py --hold-out 0.25 reports on the other half" in printed
    said = next(line for line in printed.splitlines() if line.startswith("next: "))
    _, script, *arguments = shlex.split(said.removeprefix("next: "))
    assert script == "evaluate.py"
    evaluate.main(arguments)
    metrics = json.loads((tmp_path / "runs" / "mine" / "zeroshot" / "metrics.json").read_text())
    assert sum(row["support"] for row in metrics["per_class"].values()) == 6
    printed = capsys.readouterr()
    assert "data: pictures (test), the half of --hold-out 0.25 that does not choose the checkpoint\n" in printed.out
    assert "pictures (val), the half of --hold-out 0.25 that chooses the checkpoint, 3 images" in printed.out
    assert "warning" not in printed.err
    evaluate.main([*arguments, "--split=val"])
    assert "chose its checkpoint by these images, or some of them: figures are too good" in capsys.readouterr().err


@pytest.fixture
def run(pictures, tmp_path) -> Path:
    """Trained with a quarter of the pictures kept back."""
    folder = tmp_path / "runs" / "kept"
    train_clip.main([*TRAINING, f"--data={pictures}", "--hold-out=0.25", "--eval-every=0", f"--output-dir={folder}"])
    return folder


@pytest.mark.parametrize(
    ("flags", "warned"),
    [((), True), (("--hold-out=0.5",), True), (("--hold-out=0.25",), False), (("--hold-out=0.1",), False)],
    ids=["all", "more than was kept", "what was kept", "less"],
)
def test_evaluation_warns_of_images_that_the_model_was_trained_on(run, pictures, flags, warned, tmp_path, capsys):
    out = tmp_path / "out"
    common = [f"--data={pictures}", f"--output-dir={out}", f"--cache-dir={tmp_path}", "--workers=0", *flags]
    words = f"{run} has seen these images, or some of them, in training: figures are too good; use --hold-out 0.25"
    assert evaluate.main(["zeroshot", f"--model={run}", *common]) == 0
    assert (f"warning: {words}" in capsys.readouterr().err) is warned
    assert (words in (out / "report.html").read_text()) is warned
    compared = [str(run), str(run / "export")]
    assert evaluate.main(["compare", "--models", *compared, *common]) == 0
    assert (out / "report.html").read_text().count("has seen these images") == 2 * warned


def test_other_pictures_are_measured_without_a_warning(run, pictures, tmp_path, capsys):
    others = pictures.rename(tmp_path / "others")
    arguments = [f"--data={others}", f"--output-dir={tmp_path}", f"--cache-dir={tmp_path}", "--workers=0"]
    assert evaluate.main(["zeroshot", f"--model={run}", *arguments]) == 0
    assert "warning" not in capsys.readouterr().err


# Data whose only other split is a test split


@pytest.fixture
def squares(tmp_path) -> Path:
    counts = {split: dict.fromkeys(COLOURS, count) for split, count in (("train", 6), ("test", 3))}
    return make_squares(tmp_path / "squares", counts)


def test_a_test_split_is_measured_and_chooses_nothing(squares, tmp_path, capsys):
    flags = [*TRAINING[:-1], f"--data={squares}", "--steps=3", "--eval-every=1", "--save-every=1"]
    train_clip.main([*flags, f"--output-dir={tmp_path / 'run'}"])
    words = "a test split: its figures choose no checkpoint, and the last weights are exported"
    printed = capsys.readouterr().out
    assert words in printed and "exporting the model of step 3" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"] == {} and 0 <= summary["eval"]["accuracy"] <= 1
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()
    chosen = [*flags, f"--val-data={squares}", f"--output-dir={tmp_path / 'chosen'}"]
    train_clip.main(chosen)
    assert words not in capsys.readouterr().out and (tmp_path / "chosen" / "checkpoints" / "best").exists()
    out = [f"--data={squares}", f"--output-dir={tmp_path}", f"--cache-dir={tmp_path}", "--workers=0"]
    for run, warned in (("run", False), ("chosen", True)):
        assert evaluate.main(["zeroshot", f"--model={tmp_path / run}", *out]) == 0
        assert ("chose its checkpoint by these images" in capsys.readouterr().err) is warned


def test_a_best_checkpoint_that_a_test_split_chose_is_not_exported_after_a_resume(squares, tmp_path):
    flags = [
        *TRAINING[:-1],
        f"--data={squares}",
        "--eval-every=1",
        "--save-every=1",
        f"--output-dir={tmp_path / 'run'}",
    ]
    train_clip.main([*flags, f"--val-data={squares}"])
    train_clip.main([*flags, "--steps=3", "--resume=auto"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best"] == {}


def test_patience_needs_images_that_may_choose(squares, pictures, tmp_path):
    flags = [*TRAINING, "--patience=2", f"--output-dir={tmp_path / 'run'}"]
    for data, found in ((squares, r"only a test split .*squares .test."), (pictures, "no validation images")):
        with pytest.raises(InputError, match=f"--patience 2 .* the data has {found}.*; give --val-data, a val split"):
            train_clip.main([*flags, f"--data={data}"])
    train_clip.main([*flags, f"--data={squares / 'train'}", "--hold-out=0.4"])


def test_val_data_beside_held_out_images_chooses_and_evaluation_reports_on_half_of_them(pictures, tmp_path, capsys):
    others = make_squares(tmp_path / "others", {"": {"red": 2, "green": 2}})
    flags = [f"--data={pictures}", "--hold-out=0.25", f"--val-data={others}", "--eval-every=1"]
    train_clip.main([*TRAINING, *flags, f"--output-dir={tmp_path / 'run'}"])
    printed = capsys.readouterr().out
    assert (
        "half of the held-out images is not used here; evaluate.py --hold-out 0.25 reports on the other half" in printed
    )
    assert f"--data {pictures} --hold-out 0.25" in printed.partition("next: ")[2]
