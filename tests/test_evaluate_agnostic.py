"""Agnostic: entropies equal sums by hand and rise with temperature, and uninformative prompts come last."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from made_classes import COLOURS, make_squares, save_model

import evaluate
from lib.backends import Precision
from lib.data.named_sets import CLASSES
from lib.data.sources import open_evaluation
from lib.evaluation import probe_classifiers
from lib.evaluation.agnostic import (
    class_means,
    entropies,
    generic_prompts,
    prompt_probabilities,
    rank_carriers,
    variance_between,
)
from lib.evaluation.embed import embed_images, embed_texts
from lib.evaluation.probe_classifiers import LINEAR_SVM, choose
from lib.evaluation.splits import Labelled
from lib.evaluation.subject import Model
from lib.evaluation.tasks import Agnostic

COUNTS = {split: dict.fromkeys(COLOURS, count) for split, count in (("train", 10), ("test", 6))}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares"), COUNTS)


@pytest.fixture(autouse=True)
def quick_mlp(monkeypatch):
    monkeypatch.setattr(probe_classifiers, "MLP_STEPS", 10)


def agnostic(model: Path, data: Path, out: Path, *flags: str) -> dict:
    arguments = [f"--model={model}", f"--data={data}", f"--output-dir={out}", f"--cache-dir={out.parent / 'cache'}"]
    assert evaluate.main(["agnostic", *arguments, "--workers=0", *flags]) == 0
    return json.loads((out / "metrics.json").read_text())


def entropy_by_hand(similarities: np.ndarray, temperature: float) -> list[float]:
    """Of each row, by two loops."""
    found = []
    for row in similarities.astype(np.float64):
        weights = [math.exp((each - max(row)) / temperature) for each in row]
        shares = [weight / sum(weights) for weight in weights]
        found.append(-sum(share * math.log(share) for share in shares if share > 0))
    return found


# The script


def test_entropy_rises_to_its_maximum_with_temperature(model, squares, tmp_path):
    assert {0.5, 0.07, 0.03, 0.02} < set(Agnostic.temperatures) and min(Agnostic.temperatures) < 0.02
    metrics = agnostic(model, squares, tmp_path / "out", "--temperatures", "0.02", "0.5", "0.07", "0.005")
    temperatures = [float(key) for key in metrics]
    by_temperature = [metrics[f"{temperature:g}"]["mean_entropy"] for temperature in sorted(temperatures)]
    assert by_temperature == sorted(by_temperature)
    assert 0.95 * math.log(32) < by_temperature[-1] <= math.log(32)
    loaded = Model.load(str(model), Precision("fp32", torch.device("cpu")))
    images = embed_images(
        loaded.towers, open_evaluation(str(squares), "test", None), loaded.pipeline, device="cpu"
    ).embeds
    texts = embed_texts(loaded.towers, generic_prompts(None), loaded.processing.tokenize, device="cpu")
    similarities = images.numpy() @ texts.numpy().T
    for key in ("0.5", "0.02"):
        assert metrics[key]["mean_entropy"] == pytest.approx(np.mean(entropy_by_hand(similarities, float(key))))
        assert metrics[key]["max_entropy"] == pytest.approx(math.log(32))
        assert {"accuracy", "macro_f1", "mlp_accuracy", "mlp_macro_f1", "converged"} < set(metrics[key])
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4 and "Prompts that separate the classes" in report


def test_own_prompts_and_temperatures(model, squares, tmp_path, capsys):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text('- "red"\n- "green"\n- "something else"\n- "red"\n')
    metrics = agnostic(model, squares, tmp_path / "out", "--prompts", str(prompts), "--temperatures", "2", "0.25")
    assert list(metrics) == ["2", "0.25"]
    assert all(entry["max_entropy"] == pytest.approx(math.log(3)) for entry in metrics.values())
    assert "prompts: 3" in capsys.readouterr().out
    assert "something else" in (tmp_path / "out" / "report.html").read_text()


def test_unstandardized_shares_of_a_high_temperature_tell_less(model, tmp_path):
    # Uneven classes: what cannot be learnt is answered with the most frequent one.
    counts = {"train": {"red": 12, "blue": 6}, "test": {"red": 6, "blue": 3}}
    data = make_squares(tmp_path / "uneven", counts, noise=30)
    flags = ("--temperatures", "100000")
    standardized = agnostic(model, data, tmp_path / "a", *flags)["100000"]
    plain = agnostic(model, data, tmp_path / "b", *flags, "--no-standardize")["100000"]
    assert standardized["accuracy"] == 1.0 and plain["accuracy"] == pytest.approx(6 / 9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperatures", "0.1", "0"], ["--temperatures 0 must be above 0"]),
        (["--temperatures", "nan"], ["--temperatures nan must be above 0"]),
        (["--temperatures"], ["--temperatures needs at least one"]),
        (["--prompts", "FOLDER/none.yaml"], ["--prompts", "none.yaml cannot be read"]),
        (["--prompts", "FOLDER/classes.yaml"], ["has a place for a class name"]),
        (["--prompts", "FOLDER/one.yaml"], ["holds 1 text", "at least 2"]),
        (["--prompts", "FOLDER/mapping.yaml"], ["must hold a list of texts"]),
        (["--prompts", "FOLDER/broken.yaml"], ["is not YAML"]),
    ],
)
def test_a_fault_of_the_users_is_one_line(model, squares, tmp_path, capsys, flags, words):
    files = {"classes": '- "a {}"', "one": "- red\n- red", "mapping": "red: 1", "broken": "- [red"}
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    arguments = [f"--model={model}", f"--data={squares}", f"--output-dir={tmp_path / 'out'}"]
    assert evaluate.main(["agnostic", *arguments, *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and all(word in lines[-1] for word in words)
    assert "Traceback" not in "".join(lines)


# What it is made of


@pytest.mark.parametrize("temperature", [10.0, 0.5, 0.07, 0.001])
def test_entropy_equals_a_sum_by_hand(temperature):
    similarities = np.random.default_rng(0).normal(0, 0.2, (40, 9)).astype(np.float32)
    found = entropies(prompt_probabilities(torch.from_numpy(similarities), temperature))
    np.testing.assert_allclose(found, entropy_by_hand(similarities, temperature), rtol=1e-12, atol=1e-12)


def test_entropy_has_its_ends():
    alike, decided = torch.full((1, 32), 0.3), torch.eye(32)[:1]
    for temperature in (100.0, 0.07, 1e-5):
        assert entropies(prompt_probabilities(alike, temperature)).item() == pytest.approx(math.log(32), abs=1e-12)
    assert entropies(prompt_probabilities(decided, 1e-4)).item() == 0.0
    assert entropies(prompt_probabilities(decided, 1e6)).item() == pytest.approx(math.log(32), abs=1e-9)


def test_the_shipped_prompts_are_generic():
    prompts = generic_prompts(None)
    assert len(prompts) == 32
    cifar = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    named = [word for prompt in prompts for word in prompt.split() if word in {*cifar, *CLASSES}]
    assert not named


def test_the_prompt_that_follows_the_classes_comes_first():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], 40)
    noise = rng.normal(0, 1, 120)
    rows = np.stack([noise, labels + rng.normal(0, 0.1, 120), np.ones(120)], axis=1).astype(np.float32)
    test = Labelled(rows, labels)
    carriers = rank_carriers(["noise", "classes", "constant"], test, choose(LINEAR_SVM, test, test, 0), seed=0)
    assert [carrier.prompt for carrier in carriers] == ["classes", "noise", "constant"]
    first = carriers[0]
    assert first.between > 0.98 and first.lost > 0.4 and (first.highest, first.lowest) == (3, 0)
    assert carriers[1].between < 0.1 and abs(carriers[1].lost) < 0.05 and carriers[2].between == 0.0


def test_variance_between_classes_equals_loops():
    rng = np.random.default_rng(1)
    data = Labelled(rng.normal(0, 1, (30, 4)).astype(np.float32), rng.integers(0, 3, 30))
    classes, means = class_means(data)
    for column in range(4):
        values = data.rows[:, column].astype(float)
        total = sum((value - values.mean()) ** 2 for value in values)
        within = sum(
            (value - values[data.labels == label].mean()) ** 2 for value, label in zip(values, data.labels, strict=True)
        )
        assert variance_between(data)[column] == pytest.approx(1 - within / total, abs=1e-9)
        for place, label in enumerate(classes):
            assert means[place, column] == pytest.approx(values[data.labels == label].mean(), abs=1e-6)
