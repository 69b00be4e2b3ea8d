"""Zero-shot: metrics equal a naive twin's and peers', and nothing is evaluated on the images that chose it."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from made_classes import COLOURS, make_squares, save_model
from PIL import Image
from sklearn import metrics as sk
from small_evaluation import SmallImages, unit
from torch import Tensor

import evaluate
from lib.data.prompt_banks import renamed
from lib.errors import InputError
from lib.evaluation import charts, class_charts, zeroshot
from lib.evaluation.calibration import BINS, calibrate, fit_scale, reliability
from lib.evaluation.classification import class_embeddings, ensemble, top5, zeroshot_metrics, zeroshot_scores
from lib.evaluation.prompt_study import study_prompts
from lib.evaluation.splits import Fold, Labelled, folds

COUNTS = {split: dict.fromkeys(COLOURS, count) for split, count in (("train", 2), ("val", 4), ("test", 5))}


# Figures


@pytest.mark.parametrize(("count", "classes"), [(400, 17), (300, 6), (50, 5), (20, 2)])
def test_zeroshot_figures_are_scikit_learns(count, classes):
    images, class_embeds = unit(count, 9), unit(classes, 9, seed=1)
    labels = np.random.default_rng(0).permutation(np.arange(count) % classes)
    names = [f"class {i}" for i in range(classes)]
    found = zeroshot_metrics(images, labels, class_embeds, names)
    scores = (images @ class_embeds.T).numpy()
    predicted = scores.argmax(1)
    assert found["accuracy"] == sk.accuracy_score(labels, predicted)
    for name, function in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        assert found[f"macro_{name}"] == function(labels, predicted, average="macro", zero_division=0)
        per_class = function(labels, predicted, average=None, zero_division=0)
        assert [found["per_class"][c][name] for c in names] == per_class.tolist()
    assert [found["per_class"][c]["support"] for c in names] == np.bincount(labels).tolist()
    assert found["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    top5 = np.mean([label in np.argsort(row)[-5:] for label, row in zip(labels, scores, strict=True)])
    assert found["top5"] == pytest.approx(top5, abs=1e-12)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("seed", range(20))
def test_top5_takes_ties_as_the_prediction_does(seed):
    """Scores of few values: the classes stand in the order of a stable sort, of which argmax is the first."""
    random = np.random.default_rng(seed)
    count, classes = 40, int(random.integers(2, 12))
    scores = random.integers(0, 1 + seed % 4, (count, classes)).astype(np.float32)
    labels = random.integers(0, classes, count)
    order = np.argsort(-scores, axis=1, kind="stable")
    assert (order[:, 0] == scores.argmax(axis=1)).all()
    assert top5(labels, scores) == (order[:, :5] == labels[:, None]).any(axis=1).mean()
    assert top5(labels, scores) >= (scores.argmax(axis=1) == labels).mean()


def test_open_clip_makes_the_same_classifier_and_counts_the_same():
    open_clip = pytest.importorskip("open_clip")
    classes, templates = [f"thing {i}" for i in range(23)], ["a photo of a {}.", "the {}", "many {}s"]

    def embed_text(texts: list[str]) -> Tensor:
        return torch.cat([unit(1, 16, seed=zlib.crc32(text.encode())) for text in texts])

    class Model:
        def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
            return embed_text(["".join(map(chr, row[row > 0])) for row in tokens])

    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([[*map(ord, text), *[0] * (40 - len(text))] for text in texts])

    weights = open_clip.build_zero_shot_classifier(Model(), tokenize, classes, templates)
    found = class_embeddings(classes, templates, embed_text)
    torch.testing.assert_close(found, weights.T, atol=1e-6, rtol=0)
    images, labels = unit(500, 16, seed=7), np.arange(500) % 23
    images = torch.nn.functional.normalize(images + 0.5 * found[labels], dim=1)
    hits = (images @ weights).topk(5).indices == torch.from_numpy(labels)[:, None]
    top1, top5 = hits[:, 0].sum().item(), hits.sum().item()
    metrics = zeroshot_metrics(images, labels, found, classes)
    assert (metrics["accuracy"], metrics["top5"]) == (top1 / 500, top5 / 500)
    assert 0 < top1 < top5 < 500


def test_zeroshot_by_hand_with_a_class_without_images():
    # Predictions: a, a, b, b, b for the true a, a, a, b, b; nothing is ever c.
    images = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]])
    found = zeroshot_metrics(images, np.array([0, 0, 0, 1, 1]), torch.eye(3), ["a", "b", "c"])
    assert found["confusion"] == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["accuracy"] == 0.8
    assert found["top5"] == 1.0
    assert found["macro_f1"] == pytest.approx(0.8)
    assert found["macro_recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert list(found) == [
        "accuracy", "top5", "macro_precision", "macro_recall", "macro_f1", "per_class", "confusion"
    ]  # fmt: skip


def test_equal_embeddings_classify_at_chance():
    found = zeroshot_metrics(unit(1, 8).repeat(90, 1), np.arange(90) % 9, unit(1, 8).repeat(9, 1), "abcdefghi")
    assert found["accuracy"] == pytest.approx(1 / 9)
    assert found["top5"] == pytest.approx(5 / 9)


def test_a_class_is_the_mean_direction_of_its_prompts():
    seen = []

    def embed_text(texts: list[str]) -> Tensor:
        seen.extend(texts)
        return unit(len(texts), 5)

    found = class_embeddings(["ant", "bee"], ["a {}", "two {}s", "no {}"], embed_text)
    assert seen == ["a ant", "two ants", "no ant", "a bee", "two bees", "no bee"]
    prompts = unit(6, 5)
    for row, first in zip(found, (0, 3), strict=True):
        mean = (prompts[first] + prompts[first + 1] + prompts[first + 2]) / 3
        torch.testing.assert_close(row, mean / mean.norm())


# What is chosen on held-out images


def test_halves_judge_every_image_once_and_never_by_itself():
    labels = np.random.default_rng(3).permutation(np.arange(97) % 6)
    first, second = folds(Labelled(unit(97, 4), labels), None, seed=1)
    for fold, other in ((first, second), (second, first)):
        assert np.array_equal(fold.chooser.labels, labels[other.rows])
        assert np.array_equal(fold.chooser.rows, unit(97, 4)[other.rows])
        assert np.abs(np.bincount(fold.chooser.labels) - np.bincount(labels) / 2).max() <= 1
    assert sorted([*first.rows, *second.rows]) == list(range(97))
    again, other_seed = (folds(Labelled(unit(97, 4), labels), None, seed) for seed in (1, 2))
    assert np.array_equal(again[0].rows, first.rows) and not np.array_equal(other_seed[0].rows, first.rows)


def naive_study(test: Labelled, prompts: Tensor, chooser: Labelled) -> dict:
    """The study with loops over templates and classes, each prediction from a list of similarities."""
    classes, templates = prompts.shape[:2]

    def predict(images: Tensor, rows: list[Tensor]) -> list[int]:
        return [max(range(classes), key=lambda k: float((image.double() * rows[k].double()).sum())) for image in images]

    def f1(labels, predicted, k) -> float:
        hits = sum(y == k == p for y, p in zip(labels, predicted, strict=True))
        total = sum(int(y == k) + int(p == k) for y, p in zip(labels, predicted, strict=True))
        return 2 * hits / total if total else 0.0

    chosen_on = [predict(chooser.rows, list(prompts[:, t])) for t in range(templates)]
    right = [sum(y == p for y, p in zip(chooser.labels, each, strict=True)) for each in chosen_on]
    order = sorted(range(templates), key=lambda t: -right[t])
    per_class = [max(order, key=lambda t, k=k: f1(chooser.labels, chosen_on[t], k)) for k in range(classes)]

    def accuracy(rows: list[Tensor]) -> float:
        predicted = predict(test.rows, rows)
        return sum(y == p for y, p in zip(test.labels, predicted, strict=True)) / len(test.labels)

    return {
        "alone": [accuracy(list(prompts[:, t])) for t in range(templates)],
        "best": accuracy(list(prompts[:, order[0]])),
        "per_class": per_class,
        "best_per_class": accuracy([prompts[k, t] for k, t in enumerate(per_class)]),
    }


def clouds(count: int, classes: int, noise: float, seed: int) -> Labelled:
    labels = np.arange(count) % classes
    corners = unit(classes, 12)
    embeds = torch.nn.functional.normalize(corners[labels] + noise * unit(count, 12, seed=seed), dim=1)
    return Labelled(embeds, labels)


def noisy_prompts(classes: int, templates: int, noise: float) -> Tensor:
    prompts = unit(classes, 12)[:, None] + noise * unit(classes * templates, 12, seed=5).view(classes, templates, 12)
    return torch.nn.functional.normalize(prompts, dim=2)


def test_the_prompt_study_equals_loops():
    test, chooser, prompts = clouds(90, 6, 1.5, seed=8), clouds(48, 6, 1.5, seed=9), noisy_prompts(6, 5, 1.2)
    found = study_prompts(test, prompts, folds(test, chooser, 0))
    naive = naive_study(test, prompts, chooser)
    assert [each["accuracy"] for each in found.alone] == naive["alone"]
    assert found.best["accuracy"] == naive["best"]
    assert found.chosen_per_class[0].tolist() == naive["per_class"]
    assert found.best_per_class["accuracy"] == naive["best_per_class"]
    assert len(set(naive["per_class"])) > 1, "the classes differ in their best template"
    told = found.metrics([f"class {k}" for k in range(6)], [f"{t} {{}}" for t in range(5)])
    assert told["best_template_per_class"]["chosen"]["class 2"] == [f"{naive['per_class'][2]} {{}}"]
    assert told["best_template"]["chosen"] == [f"{found.chosen[0]} {{}}"]


def test_halves_do_not_flatter_where_choosing_on_the_test_images_would():
    # Labels have nothing to do with the images: whatever beats chance was chosen by looking.
    classes, rng = 8, np.random.default_rng(0)
    test = Labelled(unit(320, 12, seed=3), rng.permutation(np.arange(320) % classes))
    prompts = unit(classes * 60, 12, seed=4).view(classes, 60, 12)
    honest = study_prompts(test, prompts, folds(test, None, 0)).best["accuracy"]
    peeking = study_prompts(test, prompts, [Fold(test, np.arange(320))]).best["accuracy"]
    error = math.sqrt(1 / 8 * 7 / 8 / 320)
    assert honest - 1 / 8 < 2 * error < peeking - 1 / 8


def test_one_image_or_one_class_is_no_fault():
    for test in (Labelled(unit(1, 12), np.array([2])), Labelled(unit(4, 12), np.zeros(4, dtype=np.int64))):
        prompts = noisy_prompts(3 if len(test.labels) == 1 else 1, 2, 0.5)
        parts = folds(test, None, 0)
        study_prompts(test, prompts, parts)
        class_embeds = ensemble(prompts)
        scores = zeroshot_scores(test.rows, class_embeds)
        before, after = calibrate(scores, test.labels, class_embeds, parts, 10.0)
        assert math.isfinite(before.ece) and math.isfinite(after.nll)


# Calibration


def test_the_calibration_error_equals_loops():
    rng = np.random.default_rng(0)
    scores, labels, scale = rng.normal(0, 0.3, (200, 5)), rng.integers(5, size=200), rng.choice([4.0, 9.0], 200)
    found = reliability(scores, labels, scale, [4.0, 9.0])
    bins, nll = [[] for _ in range(BINS)], 0.0
    for row, label, factor in zip(scores, labels, scale, strict=True):
        powers = [math.exp(factor * score) for score in row]
        shares = [power / sum(powers) for power in powers]
        sure = max(shares)
        place = next(b for b in range(BINS) if b / BINS < sure <= (b + 1) / BINS)
        bins[place].append((sure, shares.index(sure) == label))
        nll -= math.log(shares[label]) / 200
    ece = 0.0
    for content in filter(None, bins):
        confidence, accuracy = (sum(column) / len(content) for column in zip(*content, strict=True))
        ece += len(content) / 200 * abs(accuracy - confidence)
    assert found.ece == pytest.approx(ece, abs=1e-12) and found.nll == pytest.approx(nll, abs=1e-12)
    assert found.counts.tolist() == [len(content) for content in bins]
    assert found.temperatures == [1 / 4, 1 / 9]


def test_the_fitted_temperature_is_the_one_that_made_the_labels():
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, (20_000, 6))
    shares = np.exp(12.0 * scores)
    shares /= shares.sum(1, keepdims=True)
    labels = (rng.random((20_000, 1)) > shares.cumsum(1)).sum(1).clip(max=5)
    fitted = fit_scale(scores, labels)
    assert fitted == pytest.approx(12.0, rel=0.03)
    best = min((reliability(scores, labels, np.full(20_000, s), [s]).nll, s) for s in np.geomspace(4, 40, 200))
    assert fitted == pytest.approx(best[1], rel=0.02)
    after = reliability(scores, labels, np.full(20_000, fitted), [fitted])
    overconfident = reliability(scores, labels, np.full(20_000, 100.0), [100.0])
    assert after.ece < 0.01 < 0.1 < overconfident.ece


def test_the_temperature_is_fitted_on_the_other_images():
    test, sharp = clouds(80, 4, 1.5, seed=1), clouds(80, 4, 0.05, seed=2)
    class_embeds = unit(4, 12)
    scores = zeroshot_scores(test.rows, class_embeds)
    before, after = calibrate(scores, test.labels, class_embeds, folds(test, sharp, 0), 20.0)
    expected = fit_scale(zeroshot_scores(sharp.rows, class_embeds), sharp.labels)
    assert before.temperatures == [1 / 20] and after.temperatures == [1 / expected]
    halves = calibrate(scores, test.labels, class_embeds, folds(test, None, 0), 20.0)[1]
    assert len(set(halves.temperatures)) == 2 and halves.nll < before.nll


# Names and pictures


def test_class_names_come_from_a_list_or_a_mapping(tmp_path):
    file = tmp_path / "names.yaml"
    classes = ("ant", "bee", "cat")
    file.write_text("- an ant\n- a bee\n- a cat\n")
    assert renamed(classes, file) == ("an ant", "a bee", "a cat")
    file.write_text("bee: honey bee\nant: no\n")
    assert renamed(classes, file) == ("no", "honey bee", "cat")
    for content, words in (
        ("- ant\n- bee\n", "lists 2 names for 3 classes"),
        ("dog: a dog\n", "'dog', which is no class of the data; they are ant, bee, cat"),
        ("bee: false\n", "False is no name"),
        ("just words\n", 'lines as in: "ant: a name"'),
        ("- [\n", "is not YAML"),
        (None, "cannot be read"),
    ):
        file.write_text(content) if content else file.unlink()
        with pytest.raises(InputError, match="--class-names") as fault:
            renamed(classes, file)
        assert words in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize("count", [2, 26])
def test_zeroshot_pictures_for_few_and_many_classes(monkeypatch, tmp_path, count):
    for limit, few in {"ANNOTATED_CLASSES": 5, "LABELLED_CLASSES": 10, "MOST_BARS": 20, "BARS_PER_COLUMN": 9}.items():
        monkeypatch.setattr(class_charts, limit, few)
    monkeypatch.setattr(charts, "MOST_TEMPLATES", 10)
    monkeypatch.setattr(zeroshot, "PREDICTIONS", 6)
    classes = [f"class_{i} of $very <long> names & more" for i in range(count)]
    rng = np.random.default_rng(0)
    labels = np.arange(2 * count) % count
    predicted = np.where(rng.random(2 * count) < 0.7, labels, rng.integers(0, count, 2 * count))
    scores = torch.nn.functional.one_hot(torch.from_numpy(predicted), count).float()
    metrics = zeroshot_metrics(scores, labels, torch.eye(count), classes)
    test, prompts = Labelled(scores, labels), torch.eye(count)[:, None].repeat(1, 13, 1)
    parts = folds(test, None, 0)
    study = study_prompts(test, prompts, parts)
    reliabilities = calibrate(scores.numpy(), labels, torch.eye(count), parts, 5.0)
    templates = [f"a template number {i} of $some length {{}}" for i in range(13)]
    pictures = zeroshot.report_charts(metrics, study, reliabilities, classes, templates)
    pictures.append(zeroshot.example_sheet(labels, predicted, classes, SmallImages(2 * count, {}).open))
    names = ["confusion.png", "class_f1.png", "prompts.png", "calibration.png", "examples.png"]
    assert [picture.file for picture in pictures] == names
    for picture in pictures:
        picture.draw(tmp_path / picture.file)
    twice = {"one": metrics["confusion"], "two": metrics["confusion"]}
    class_charts.plot_confusions(twice, classes, tmp_path / "two.png")
    for name in (*names, "two.png"):
        with Image.open(tmp_path / name) as drawn:
            assert max(drawn.size) < 4000 and min(drawn.size) > 100


# The script


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def run_zeroshot(model: Path, data: str | Path, out: Path, *flags: str) -> dict:
    arguments = [f"--model={model}", f"--data={data}", f"--output-dir={out}", f"--cache-dir={out.parent / 'cache'}"]
    assert evaluate.main(["zeroshot", *arguments, "--workers=0", *flags]) == 0
    return json.loads((out / "metrics.json").read_text())


def test_the_script_studies_prompts_and_calibrates_on_the_validation_part(model, tmp_path, capsys):
    squares = make_squares(tmp_path / "squares", COUNTS)
    names = tmp_path / "names.yaml"
    names.write_text("dark grey: anthracite\n")
    metrics = run_zeroshot(model, squares, tmp_path / "out", f"--class-names={names}", "--prompts=objects")
    printed = capsys.readouterr().out
    assert "chosen on: squares (val), 16 images" in printed and "images: 20" in printed
    assert set(metrics["per_class"]) == {"red", "green", "blue", "anthracite"}
    prompts, calibration = metrics["prompts"], metrics["calibration"]
    assert prompts["ensemble"]["accuracy"] == metrics["accuracy"]
    assert len(prompts["best_template_per_class"]["chosen"]["anthracite"]) == 1
    assert set(prompts["best_template"]["chosen"]) <= set(prompts["templates"])
    assert set(calibration) == {"before", "after"} and len(calibration["after"]["temperatures"]) == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "anthracite" in page and "dark grey" not in page


def test_without_a_validation_part_halves_choose_for_each_other(model, tmp_path, capsys):
    first = run_zeroshot(model, "digits", tmp_path / "a", "--limit=40")
    assert "chosen on: one half of these images" in capsys.readouterr().out
    assert len(first["calibration"]["after"]["temperatures"]) == 2
    other = run_zeroshot(model, "digits", tmp_path / "b", "--limit=40", "--seed=1")
    assert other["calibration"]["after"] != first["calibration"]["after"], "--seed draws the halves"
    assert other["confusion"] == first["confusion"]


def test_what_was_asked_to_be_measured_is_not_what_chooses(model, tmp_path, capsys):
    squares = make_squares(tmp_path / "squares", COUNTS)
    run_zeroshot(model, squares, tmp_path / "out", "--split=val")
    assert "chosen on: one half" in capsys.readouterr().out


def test_validation_classes_are_told_by_name(model, tmp_path, capsys):
    # "blue" has no test images and "red" no validation images.
    counts = {"val": {"blue": 3, "green": 3}, "test": {"green": 4, "red": 4}}
    metrics = run_zeroshot(model, make_squares(tmp_path / "squares", counts), tmp_path / "out")
    assert {name: figures["support"] for name, figures in metrics["per_class"].items()} == {
        "blue": 0,
        "green": 4,
        "red": 4,
    }
    assert "chosen on: squares (val), 6 images" in capsys.readouterr().out
