"""Probe: choices, classifiers and metrics equal scikit-learn called by hand, and no test image influences them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_classes import COLOURS, make_squares, save_model
from ranks import on_ranks
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import evaluate
from lib.backends import Precision
from lib.data.sources import open_evaluation
from lib.distributed import rank_and_world_size
from lib.evaluation import probe_classifiers
from lib.evaluation.classification import class_figures
from lib.evaluation.embed import embed_images
from lib.evaluation.probe_classifiers import (
    FAMILIES,
    KNN,
    LINEAR_SVM,
    LOGISTIC_REGRESSION,
    Family,
    accuracy,
    choose,
    draw_shots,
    few_shot,
)
from lib.evaluation.splits import Labelled, divide
from lib.evaluation.subject import Model
from lib.evaluation.tasks import Agnostic, DataFlags, Probe, RunFlags

NAMES = ["linear_svm", "logistic_regression", "mlp", "knn"]
COUNTS = {split: dict.fromkeys(COLOURS, count) for split, count in (("train", 9), ("val", 4), ("test", 5))}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares"), COUNTS, noise=140)


@pytest.fixture(autouse=True)
def quick_mlp(monkeypatch):
    monkeypatch.setattr(probe_classifiers, "MLP_STEPS", 10)


def probe(model: Path, data: Path, out: Path, *flags: str) -> dict:
    arguments = [f"--model={model}", f"--data={data}", f"--output-dir={out}", f"--cache-dir={out.parent / 'cache'}"]
    assert evaluate.main(["probe", *arguments, "--workers=0", *flags]) == 0
    return json.loads((out / "metrics.json").read_text())


def clouds(each: int, seed: int, spread: float = 1.5, classes: int = 3) -> Labelled:
    """Normal clouds around corners of a cube."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    return Labelled((np.eye(6)[labels] + rng.normal(0, spread / 3, (len(labels), 6))).astype(np.float32), labels)


def by_hand(classifier, train: Labelled, test: Labelled) -> np.ndarray:
    scaler = StandardScaler().fit(train.rows)
    return classifier.fit(scaler.transform(train.rows), train.labels).predict(scaler.transform(test.rows))


# The script


def test_figures_equal_scikit_learn_called_by_hand(model, squares, tmp_path):
    metrics = probe(model, squares, tmp_path / "out", "--shots", "1", "4", "--draws", "2")
    assert list(metrics) == NAMES
    parts = {split: embedded_by_hand(model, squares, split) for split in COUNTS}
    train, val, test = (parts[split] for split in COUNTS)
    makers = {
        "logistic_regression": ("C", lambda C: LogisticRegression(C=C, max_iter=1000)),
        "knn": ("neighbours", lambda k: KNeighborsClassifier(min(int(k), 36))),
    }
    for name, (setting, make) in makers.items():
        family = next(family for family in FAMILIES if family.name == name)
        scores = [accuracy_score(val.labels, by_hand(make(value), train, val)) for value in family.settings]
        best = family.settings[int(np.argmax(scores))]
        both = Labelled(np.concatenate([train.rows, val.rows]), np.concatenate([train.labels, val.labels]))
        predicted = by_hand(make(best), both, test)
        assert metrics[name][setting] == best and metrics[name]["validation_accuracy"] == max(scores)
        assert metrics[name]["accuracy"] == accuracy_score(test.labels, predicted)
        assert metrics[name]["macro_f1"] == pytest.approx(f1_score(test.labels, predicted, average="macro"), abs=1e-12)
        for shots in (1, 4):
            draws = [draw_shots(train.labels, shots, seed) for seed in (0, 1)]
            assert len(metrics[name]["few_shot"][str(shots)]["draws"]) == len(draws)
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4 and "Worst classes" in report and "dark grey" in report


def embedded_by_hand(model: Path, data: Path, split: str) -> Labelled:
    loaded = Model.load(str(model), Precision("fp32", torch.device("cpu")))
    images = open_evaluation(str(data), split, None)
    return Labelled(embed_images(loaded.towers, images, loaded.pipeline, device="cpu").embeds.numpy(), images.labels)


def test_the_seed_the_draws_and_the_shots_are_the_users(model, squares, tmp_path):
    flags = ("--shots", "2", "50", "--draws", "3")
    first = probe(model, squares, tmp_path / "a", *flags, "--seed", "1")
    other = probe(model, squares, tmp_path / "b", *flags, "--seed", "2")
    few, of_other = (metrics["logistic_regression"]["few_shot"] for metrics in (first, other))
    assert list(few) == ["2"], "no class has 50 images"
    # Seed 1 draws by 1, 2, 3 and seed 2 by 2, 3, 4.
    assert few["2"]["draws"][1:] == of_other["2"]["draws"][:2] and len(few["2"]["draws"]) == 3
    assert few["2"]["accuracy"] == pytest.approx(np.mean(few["2"]["draws"]))
    assert few["2"]["deviation"] == pytest.approx(np.std(few["2"]["draws"], ddof=1))


def test_data_without_train_or_val_is_divided_and_says_so(model, tmp_path, capsys):
    data = make_squares(tmp_path / "plain", {"": dict.fromkeys(COLOURS, 8)})
    metrics = probe(model, data, tmp_path / "out", "--shots", "1", "--draws", "1")
    told = capsys.readouterr().out
    assert sum(np.sum(metrics["knn"]["confusion"], axis=0)) == 8
    assert "trained on: 20 images of plain (all)" in told and "chosen on: 4 images held out of plain (all)" in told
    assert "tested on: 8 images held out of plain (all)" in told


def as_run(model: Path, folder: Path, data: Path) -> Path:
    """The same model as the export of a run on this data."""
    run = Path(shutil.copytree(model, folder))
    (run / "config.yaml").write_text(f"data: [{data}]")
    (run / "metrics.jsonl").write_text("")
    return run


def test_a_run_that_learnt_the_training_images_chooses_on_half_of_the_test_images(model, tmp_path, capsys):
    counts = {"train": dict.fromkeys(COLOURS, 10), "test": dict.fromkeys(COLOURS, 5)}
    data, flags = make_squares(tmp_path / "data", counts, noise=140), ("--shots", "1", "--draws", "1")
    half = (
        "chosen on: 8 images of data (test), one half of it, because the model was trained on images of data (train)\n"
    )
    for name, learnt in (("whole", data), ("folder", data / "train")):
        tested = probe(as_run(model, tmp_path / name, learnt), data, tmp_path / f"{name}_out", *flags)["knn"]
        said = capsys.readouterr().out
        assert half in said and "trained on: 40 images of data (train)" in said
        assert "tested on: 12 images of data (test), the other half" in said and np.sum(tested["confusion"]) == 12
    other = as_run(model, tmp_path / "other", tmp_path / "elsewhere")
    assert np.sum(probe(other, data, tmp_path / "other_out", *flags)["knn"]["confusion"]) == 20
    assert "chosen on: 8 images held out of data (train)" in capsys.readouterr().out
    make_squares(data, {"val": dict.fromkeys(COLOURS, 2)})
    probe(tmp_path / "whole", data, tmp_path / "val_out", *flags)
    assert "chosen on: 8 images of data (val)" in capsys.readouterr().out


def test_held_out_images_choose_and_are_reported_in_halves(model, tmp_path, capsys):
    data = make_squares(tmp_path / "plain", {"": dict.fromkeys(COLOURS, 10)})
    run = as_run(model, tmp_path / "run", data)
    (run / "config.yaml").write_text(f"data: [{data}]\nhold_out: 0.4")
    probe(run, data, tmp_path / "out", "--shots", "1", "--draws", "1", "--hold-out=0.4")
    said = capsys.readouterr().out
    assert "trained on: 24 images of plain (train)" in said
    assert "chosen on: 8 images of plain (val), the half of --hold-out 0.4 that chooses the checkpoint" in said
    assert "tested on: 8 images of plain (test), the half of --hold-out 0.4 that does not choose" in said


@pytest.mark.slow
def test_two_ranks_measure_as_one_process(model, squares, tmp_path):
    alone = _both_tasks(model, squares, tmp_path / "one")
    assert on_ranks(2, _both_tasks, model, squares, tmp_path / "two") == alone
    assert [entry["few_shot"] for entry in alone[0].values()] == [{}] * len(NAMES)


def _both_tasks(model: Path, data: Path, folder: Path) -> list[dict] | None:
    """The figures of probe, without curves, and of agnostic: rank 0 measures."""
    probe_classifiers.MLP_STEPS = 10  # a rank is a process of its own
    running = RunFlags(cache_dir=folder, output_dir=folder, batch_size=7, workers=0)
    common = {"model": str(model), "data": DataFlags(data=str(data)), "run": running}
    tasks = (Probe(shots=(), **common), Agnostic(temperatures=(0.1,), **common))
    outcomes = [options.measure(torch.device("cpu")) for options in tasks]
    if rank_and_world_size()[0] > 0:
        assert outcomes == [None, None]
        return None
    # Another batch of images rounds the last digit of an embedding otherwise.
    return json.loads(
        json.dumps([outcome.metrics for outcome in outcomes]), parse_float=lambda number: round(float(number), 6)
    )


# What it is made of


def test_a_tie_takes_the_strongest_regularization_and_both_parts_are_learnt():
    train, validation = clouds(12, 0, spread=0.1), clouds(5, 1, spread=0.1)
    for family in FAMILIES[:2]:
        chosen = choose(family, train, validation, seed=0)
        assert chosen.validation_accuracy == 1.0 and chosen.setting == min(family.settings)
        assert chosen.model[0].n_samples_seen_ == 36 + 15
    # A class that only validation has is known in the end.
    late = Labelled(validation.rows + 5, validation.labels + 3)
    chosen = choose(LINEAR_SVM, train, late, seed=0)
    assert set(chosen.model.classes_) == {0, 1, 2, 3, 4, 5} and chosen.validation_accuracy == 0.0


def test_the_choice_is_the_best_of_a_loop():
    train, validation = clouds(8, 0, spread=2.5), clouds(30, 1, spread=2.5)
    for family in (LOGISTIC_REGRESSION, KNN):
        scores = {}
        for setting in family.settings:
            scores[setting] = accuracy_score(
                validation.labels, by_hand(family.build(setting, 24, 0), train, validation)
            )
        chosen = choose(family, train, validation, seed=0)
        assert chosen.validation_accuracy == max(scores.values()) == scores[chosen.setting]
        assert len(set(scores.values())) > 1, "otherwise there is nothing to choose"


def test_without_standardizing_small_rows_are_not_learnt():
    uneven = np.r_[0:60, 60:70, 120:130]
    train, test = (clouds(60, seed, spread=0.3).take(uneven) for seed in (0, 1))
    small, small_test = (Labelled(part.rows * 1e-4, part.labels) for part in (train, test))
    assert accuracy(choose(LINEAR_SVM, small, small_test, 0).model, small_test) == 1.0
    plain = choose(LINEAR_SVM, small, small_test, 0, standardize=False).model
    assert accuracy(plain, small_test) == 60 / 80, "the most frequent class"


def test_random_labels_cannot_be_read():
    train, validation, test = (clouds(60, seed, classes=4) for seed in range(3))
    rng = np.random.default_rng(0)
    shuffled, validation_too = (Labelled(part.rows, rng.permutation(part.labels)) for part in (train, validation))
    assert accuracy(choose(LINEAR_SVM, train, validation, 0).model, test) > 0.6
    assert accuracy(choose(LINEAR_SVM, shuffled, validation_too, 0).model, test) < 0.5


def test_few_shots_are_as_many_as_asked_and_more_shots_see_the_fewer_too():
    labels = np.array([0] * 9 + [1] * 2 + [3] * 6)
    for seed in range(4):
        drawn = {shots: draw_shots(labels, shots, seed) for shots in (1, 2, 4)}
        assert [np.bincount(labels[rows], minlength=4).tolist() for rows in drawn.values()] == [
            [1, 1, 0, 1], [2, 2, 0, 2], [4, 2, 0, 4],
        ]  # fmt: skip
        assert set(drawn[1]) < set(drawn[2]) < set(drawn[4])
    assert any(set(draw_shots(labels, 4, seed)) != set(drawn[4]) for seed in range(3))


def test_few_shot_equals_loops_over_settings_and_draws():
    train, validation, test = clouds(20, 0), clouds(10, 1), clouds(40, 2)
    family = Family("lr", "LR", "C", (0.001, 1.0), lambda C, rows, seed: LogisticRegression(C=C))
    found = few_shot(family, train, validation, test, shots=3, seeds=(5, 6, 7))
    means = {}
    for setting in family.settings:
        on_validation, on_test = [], []
        for seed in (5, 6, 7):
            few = train.take(draw_shots(train.labels, 3, seed))
            for part, scores in ((validation, on_validation), (test, on_test)):
                predicted = by_hand(LogisticRegression(C=setting), few, part)
                scores.append(accuracy_score(part.labels, predicted))
        means[setting] = (np.mean(on_validation), on_test)
    best = max(family.settings, key=lambda setting: means[setting][0])
    assert found.setting == best and list(found.accuracies) == means[best][1]


def test_divide_holds_out_the_same_share_of_every_class():
    labels = np.array([0] * 20 + [1] * 2 + [2] + [4] * 9)
    kept, held = divide(labels, 0.25, seed=0)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=5).tolist() == [5, 1, 0, 0, 2]
    again, other = divide(labels, 0.25, seed=0)[1], divide(labels, 0.25, seed=1)[1]
    assert np.array_equal(held, again) and not np.array_equal(held, other)


def test_class_figures_equal_counts_by_hand():
    labels, predicted = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 1, 1, 2, 2])
    found = class_figures(labels, predicted, ("a", "b", "c", "never"))
    assert found["accuracy"] == 4 / 6
    assert found["confusion"] == [[1, 1, 0, 0], [0, 2, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found["per_class"]["b"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert found["per_class"]["never"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    # Classes that neither occur nor are predicted are no part of the mean.
    assert found["macro_precision"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize("flags", [["--shots", "0"], ["--draws", "0"]])
def test_counts_below_one_are_refused(model, squares, tmp_path, capsys, flags):
    arguments = [f"--model={model}", f"--data={squares}", f"--output-dir={tmp_path}"]
    assert evaluate.main(["probe", *arguments, *flags]) == 2
    assert f"{' '.join(flags)} must be at least 1" in capsys.readouterr().err
