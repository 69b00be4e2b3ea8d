"""--hold-out: evaluation uses exactly the images that training leaves out."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import train_clip
from lib.data import open_evaluation, open_sources
from lib.errors import InputError

TRAINING = ["--effective-batch=8", "--chunk-size=4", "--xbm-size=0", "--steps=2", "--workers=0", "--save-every=0"]


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


def test_every_class_gives_its_share_and_no_image_is_in_both_parts(pictures):
    source, validation = open_sources(str(pictures), None, None, held_out_fraction=0.25)
    train, test = set(source.images.keys), set(validation.image_keys)
    assert not train & test and len(train) + len(test) == 33
    assert np.bincount(validation.labels).tolist() == [3, 3, 3]
    assert open_evaluation(str(pictures), "auto", None, held_out_fraction=0.25).image_keys == validation.image_keys
    assert open_sources(str(pictures), None, None)[1] is None, "without the flag nothing is kept back"


def test_captions_of_an_image_stay_together(table):
    source, validation = open_sources(str(table), None, None, held_out_fraction=0.2)
    assert len(validation) == 2 and len(validation.captions) == 4
    assert not set(validation.image_keys) & set(source.images.keys)
    assert source.size == 16


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
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    _, script, *arguments = shlex.split(said.removeprefix("next: "))
    assert script == "evaluate.py"
    evaluate.main(arguments)
    metrics = json.loads((tmp_path / "runs" / "mine" / "zeroshot" / "metrics.json").read_text())
    assert sum(row["support"] for row in metrics["per_class"].values()) == 9


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
