"""Compare and table: statistics equal naive twins and scikit-learn, all models use the same images."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from made_classes import COLOURS, make_squares, save_model
from made_data import make_images, make_table
from PIL import Image
from ranks import on_ranks
from sklearn import metrics as sk
from small_evaluation import SmallImages, unit
from torch.nn.functional import normalize

import evaluate
from lib.evaluation import class_charts
from lib.evaluation import compare as task
from lib.evaluation.charts import plot_training
from lib.evaluation.classification import confusion, macro_f1
from lib.evaluation.compare import (
    classifier_pictures,
    classifier_tables,
    differing,
    differing_captions,
    plot_differing_captions,
    short_names,
)
from lib.evaluation.compare_statistics import (
    bootstrap,
    classification_comparison,
    interval,
    mcnemar,
    retrieval_comparison,
)
from lib.evaluation.origin import training_of
from lib.evaluation.retrieval_answers import Matched
from lib.evaluation.retrieval_ranks import retrieval_metrics, retrieval_ranks
from lib.towers import TwoTowers

COUNTS = {"test": dict.fromkeys(COLOURS, 6)}


# Statistics


def test_mcnemar_is_the_exact_binomial_test_of_what_only_one_has_right():
    first = np.array([True] * 9 + [False] * 2 + [True] * 20 + [False] * 5)
    second = np.array([False] * 9 + [True] * 2 + [True] * 20 + [False] * 5)
    found = mcnemar(first, second)
    naive = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert (found.only_first, found.only_second) == (9, 2) and found.p_value == pytest.approx(naive, abs=1e-12)
    assert mcnemar(second, first).p_value == found.p_value
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_bootstrap_intervals_are_as_wide_as_theory_says():
    right = np.arange(400) % 4 == 0
    samples = bootstrap(lambda rows: right[rows].mean(), 400, 3000, seed=0)
    low, high = interval(samples)
    error = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - error, abs=0.004) and high == pytest.approx(0.25 + error, abs=0.004)
    assert np.array_equal(samples, bootstrap(lambda rows: right[rows].mean(), 400, 3000, seed=0))
    assert not np.array_equal(samples, bootstrap(lambda rows: right[rows].mean(), 400, 3000, seed=1))


def answers(count: int, classes: int, hits: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores whose largest is the label's in about so many."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    scores = rng.random((count, classes))
    scores[np.arange(count), labels] += rng.random(count) < hits
    return labels, scores


def test_classifiers_are_compared_as_scikit_learn_measures_them():
    labels, first = answers(150, 7, 0.6, seed=1)
    _, second = answers(150, 7, 0.8, seed=2)
    names = [f"class {k}" for k in range(7)]
    found = classification_comparison(["a", "b"], labels, [first, second], names, resamples=50, seed=3)
    for name, scores in (("a", first), ("b", second)):
        predicted, figures = scores.argmax(1), found["models"][name]
        assert figures["accuracy"] == sk.accuracy_score(labels, predicted)
        assert figures["macro_f1"] == sk.f1_score(labels, predicted, average="macro")
        assert figures["top5"] == sk.top_k_accuracy_score(labels, scores, k=5)
        assert figures["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    # The samples once more, with scikit-learn's figures.
    rng = np.random.default_rng(3)
    drawn = [rng.integers(150, size=150) for _ in range(50)]
    f1 = [
        [sk.f1_score(labels[r], s.argmax(1)[r], average="macro", zero_division=0) for s in (first, second)]
        for r in drawn
    ]
    f1 = np.array(f1)
    assert found["models"]["a"]["intervals"]["macro_f1"] == pytest.approx(np.quantile(f1[:, 0], [0.025, 0.975]))
    (pair,) = found["pairs"]
    difference = found["models"]["b"]["macro_f1"] - found["models"]["a"]["macro_f1"]
    assert pair["models"] == ["a", "b"] and pair["macro_f1"]["difference"] == difference
    # Of the same samples: resampling the models apart would give another, wider interval.
    assert pair["macro_f1"]["interval"] == pytest.approx(np.quantile(f1[:, 1] - f1[:, 0], [0.025, 0.975]))
    assert pair["mcnemar"] == mcnemar(first.argmax(1) == labels, second.argmax(1) == labels)._asdict()
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found | {}))


def test_macro_f1_of_a_confusion_is_scikit_learns_where_classes_are_missing():
    rng = np.random.default_rng(0)
    for classes in (1, 3, 9):
        labels, predicted = rng.integers(classes, size=(2, 12))
        expected = sk.f1_score(labels, predicted, average="macro", zero_division=0)
        assert macro_f1(confusion(labels, predicted, classes)) == pytest.approx(expected, abs=1e-12)


def test_recalls_are_resampled_by_image_with_its_captions():
    caption_image = np.array([0, 0, 0, 2, 2, 3, 4, 4, 5])  # image 1 has none
    texts = [unit(9, 6, seed=seed) for seed in (1, 2)]
    ranks = [retrieval_ranks(unit(6, 6), each, torch.from_numpy(caption_image)) for each in texts]
    found = retrieval_comparison(["a", "b"], ranks, caption_image, resamples=40, seed=5)
    for name, each in zip("ab", texts, strict=True):
        expected = retrieval_metrics(unit(6, 6), each, caption_image)
        for direction, figures in expected.items():
            assert {key: found["models"][name][direction][key] for key in figures} == figures
    rng, images, recalls = np.random.default_rng(5), [0, 2, 3, 4, 5], []
    for _ in range(40):
        hits = total = 0
        for place in rng.integers(5, size=5):
            for caption in range(9):
                if caption_image[caption] == images[place]:
                    hits += int(ranks[0][1][caption] <= 1)
                    total += 1
        recalls.append(hits / total)
    interval_found = found["models"]["a"]["text_to_image"]["intervals"]["R@1"]
    assert interval_found == pytest.approx(np.quantile(recalls, [0.025, 0.975]))
    pair = found["pairs"][0]["image_to_text"]
    assert pair["R@5"] == found["models"]["b"]["image_to_text"]["R@5"] - found["models"]["a"]["image_to_text"]["R@5"]


def test_differing_images_are_those_that_only_some_have_right():
    labels = np.array([0, 1, 2, 0, 1, 2])
    first, second = np.array([0, 1, 2, 1, 0, 2]), np.array([0, 2, 2, 0, 2, 1])
    assert differing(labels, np.stack([first, second])) == [1, 5, 3], "those that the first has right come first"
    wrong = np.array([1, 2, 0, 1, 2, 0]), np.array([1, 2, 1, 1, 2, 0])
    assert differing(labels, np.stack(wrong)) == [2], "where none is right, those on which they err differently"
    assert differing(labels, np.stack([first, first])) == []


# What the runs tell


def write_run(folder: Path, epochs: bool = True, loss: float = 2.0) -> Path:
    lines = [
        {"step": k, "epoch": k / 4 if epochs else None, "loss": loss / k, "step_seconds": 0.5, "xbm_used": k > 3}
        for k in range(1, 9)
    ]
    (folder / "checkpoints" / "step_000004").mkdir(parents=True)
    lines.insert(4, {"step": 4, "eval": {"accuracy": 0.5}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_losses_of_training_are_those_that_people_read(tmp_path):
    """The sigmoid loss per candidate; a comparison draws losses of one kind in one panel."""
    run = write_run(tmp_path / "run")
    plain = training_of(str(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | ({"loss_per_candidate": line["loss"] / 32} if "loss" in line else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = training_of(str(run))
    assert found.losses == [loss / 32 for loss in plain.losses]
    assert (plain.kind, found.kind) == ("loss", "loss per candidate")
    assert task._training_table({"a": plain, "b": found})[1:] == [
        ["a", "2 epochs", "2", "0.25"],
        ["b", "2 epochs", "2", "0.007812 per candidate"],
    ]
    plot_training({"a": plain, "b": found}, tmp_path / "training.png")


def test_training_is_read_from_the_run_that_a_model_lies_in(tmp_path):
    run = write_run(tmp_path / "run")
    found = training_of(str(run))
    assert found == training_of(str(run / "export")) == training_of(str(run / "checkpoints" / "best"))
    assert found.seconds_per_epoch == 2.0 and found.epochs[-1] == 2.0 and len(found.losses) == 8
    assert found.memory_from == 1.0
    early = training_of(str(run / "checkpoints" / "step_000004"))
    assert early.epochs[-1] == 1.0 and early.losses == found.losses[:4]
    assert training_of("openai/clip-vit-base-patch32") is None
    without = training_of(str(write_run(tmp_path / "stream", epochs=False)))
    assert without.seconds_per_epoch is None and without.epochs == list(range(1, 9))


@pytest.mark.parametrize("count", [1, 26])
def test_pictures_for_few_and_many_classes(monkeypatch, tmp_path, count):
    """Two $ in a name would be a formula, and one that ends in ^ cannot be drawn."""
    monkeypatch.setattr(class_charts, "ANNOTATED_CLASSES", 5)
    monkeypatch.setattr(class_charts, "LABELLED_CLASSES", 10)
    monkeypatch.setattr(class_charts, "MOST_BARS", 20)
    monkeypatch.setattr(class_charts, "BARS_PER_COLUMN", 9)
    monkeypatch.setattr(task, "DIFFERING_IMAGES", 6)
    classes = [f"class_{k} of $very <long> names & more" for k in range(count)]
    answered = {f"a $model^$ with a rather long name {seed}": answers(2 * count, count, 0.5, seed) for seed in range(3)}
    labels, scores = np.arange(2 * count) % count, [scores for _, scores in answered.values()]
    metrics = classification_comparison(list(answered), labels, scores, classes, resamples=5, seed=0)
    predicted = dict(zip(answered, (each.argmax(1) for each in scores), strict=True))
    pictures = classifier_pictures(metrics, labels, predicted, classes, SmallImages(2 * count, {}).open)
    assert len(pictures) == (3 if count == 1 else 4), "models that agree have no picture of differences"
    trainings = {f"run $x^$ {k}": training_of(str(write_run(tmp_path / f"{k}", loss=10.0**k))) for k in range(3)}
    plot_training(trainings, tmp_path / "training.png")
    for picture in pictures:
        picture.draw(tmp_path / picture.file)
    for name in (*(picture.file for picture in pictures), "training.png"):
        path = tmp_path / name
        with Image.open(path) as drawn:
            assert max(drawn.size) < 6000 and min(drawn.size) > 100
    overall, pairs, per_class = classifier_tables(metrics).values()
    assert len(overall) == 4 and len(pairs) == 4 and len(per_class) == count + 1
    assert all(len(row) == len(rows[0]) for rows in (overall, pairs, per_class) for row in rows)


# The scripts


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two untrained runs with different weights; the second has metrics of steps."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("one", "two")]
    for folder in folders:
        save_model(folder)
    other = TwoTowers.from_pretrained(folders[1] / "export")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    other.save_pretrained(folders[1] / "export")
    write_run(folders[1])
    return folders


def compare(models: list[Path], data: str | Path, out: Path, *flags: str) -> dict:
    arguments = [f"--data={data}", f"--output-dir={out}", f"--cache-dir={out.parent / 'cache'}", "--workers=0"]
    assert evaluate.main(["compare", "--models", *map(str, models), *arguments, *flags]) == 0
    return json.loads((out / "metrics.json").read_text())


def zeroshot_accuracy(model: Path, data: Path, out: Path) -> float:
    arguments = ["--model", str(model), "--data", str(data), "--output-dir", str(out), "--workers=0"]
    assert evaluate.main(["zeroshot", *arguments, f"--cache-dir={out.parent / 'cache'}"]) == 0
    return json.loads((out / "metrics.json").read_text())["accuracy"]


def test_compare_says_of_each_model_what_zeroshot_says(models, tmp_path, capsys):
    squares = make_squares(tmp_path / "squares", COUNTS, noise=140)
    names = tmp_path / "names.yaml"
    names.write_text("dark grey: anthracite\n")
    metrics = compare(models, squares, tmp_path / "out", "--resamples=20")
    assert list(metrics["models"]) == ["one", "two"] and set(metrics["training"]) == {"two"}
    for name, model in zip(metrics["models"], models, strict=True):
        assert metrics["models"][name]["accuracy"] == zeroshot_accuracy(model, squares, tmp_path / name)
    assert metrics["models"]["one"]["confusion"] != metrics["models"]["two"]["confusion"]
    flags = ["--names", "left", "right", f"--class-names={names}", "--prompts=objects", "--resamples=30", "--seed=1"]
    capsys.readouterr()
    other = compare(models, squares, tmp_path / "other", *flags)
    assert list(other["models"]) == ["left", "right"] and "anthracite" in other["models"]["left"]["per_class"]
    assert "intervals: 95%, by 30 samples of the images" in capsys.readouterr().out
    page = (tmp_path / "other" / "report.html").read_text()
    assert "left → right" in page and "Training" in page and "anthracite" in page


@pytest.mark.slow
def test_retrieval_models_compare_by_recall_alike_on_one_rank_and_two(models, tmp_path):
    names = [f"{k}.png" for k in range(13)]
    make_images(tmp_path, *names)
    (tmp_path / "3.png").write_bytes(b"")
    colours = [*COLOURS, *COLOURS]
    rows = [[name, f"a {colour} square"] for k, name in enumerate(names) for colour in colours[k % 3 : k % 3 + 2]]
    data = make_table(tmp_path / "captions.csv", [["filename", "caption"], *rows])
    found = compare(models, data, tmp_path / "out", "--resamples=20")
    assert {"R@1", "MRR", "median_rank", "intervals"} <= set(found["models"]["one"]["image_to_text"])
    assert {len(model) for model in found["models"].values()} == {2}
    # Without the stored embeddings, so that both ranks have to embed.
    flags = [f"--data={data}", f"--cache-dir={tmp_path / 'none'}", "--workers=0", "--resamples=20"]
    arguments = ["compare", "--models", *map(str, models), f"--output-dir={tmp_path / 'two'}", *flags]
    assert on_ranks(2, evaluate.main, arguments) == 0
    on_two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert found["models"]["one"] != found["models"]["two"]
    assert on_two["models"] == found["models"] and on_two["pairs"] == found["pairs"]
    assert (tmp_path / "out" / "differing.png").is_file()


def test_captions_on_which_models_differ_are_drawn_with_what_each_found(tmp_path, monkeypatch):
    generator, count = torch.Generator().manual_seed(0), 40
    captions = [f"caption {number}" for number in range(count)]
    models, ranks = {}, []
    for name in ("one", "two"):
        images, texts = (normalize(torch.randn(count, 8, generator=generator), dim=-1) for _ in "it")
        ranks.append(retrieval_ranks(images, texts, torch.arange(count))[1].numpy())
        models[name] = Matched(images, texts, captions, torch.arange(count), lambda row: Image.new("RGB", (9, 9), row))
    ranks = np.stack(ranks)
    rows = differing_captions(ranks)
    assert 1 < len(rows) <= 5 and all({rank <= 5 for rank in ranks[:, row]} == {True, False} for row in rows)
    assert [ranks[0, row] <= 5 for row in rows] == sorted((ranks[0, row] <= 5 for row in rows), reverse=True)
    drawn = []
    plot = task.plot_text_queries
    monkeypatch.setattr(task, "plot_text_queries", lambda asked, *rest: drawn.extend(asked) or plot(asked, *rest))
    plot_differing_captions(rows, models, ranks, "a title", tmp_path / "sheet.png")
    assert [query.text for query in drawn] == [f"{name}: caption {row}" for row in rows for name in models]
    for query, (model, row) in zip(drawn, [(model, row) for row in rows for model in (0, 1)], strict=True):
        assert query.rank == ranks[model, row]
        assert any(answer.right for answer in query.found) == (query.rank <= 5)
    assert (tmp_path / "sheet.png").stat().st_size > 5000
    assert differing_captions(np.stack([ranks[0], ranks[0]])) == []


def test_what_cannot_be_compared_is_told_in_one_line(models, tmp_path, capsys):
    one, two = map(str, models)
    make_images(tmp_path, "a.png")
    captions = make_table(tmp_path / "captions.csv", [["filename", "caption"], ["a.png", "red"]])
    for flags, words in (
        (["--models", one], "name two or more different ones"),
        (["--model", one, one], "name two or more different ones"),
        (["--models", one, two, "--names", "a"], "--names a must be 2 different ones"),
        (["--models", one, two, "--resamples=0"], "--resamples 0 must be at least 1"),
        (["--models", one, str(tmp_path)], "holds no model"),
        (["--models", one, two, f"--data={captions}", "--class-names=x.yaml"], "has captions and no classes"),
    ):
        assert evaluate.main(["compare", f"--output-dir={tmp_path / 'out'}", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_names_are_as_short_as_they_can_be():
    assert short_names(("runs/a", "runs/b/export")) == ("a", "b")
    assert short_names(("a/run", "b/run", "openai/clip")) == ("a/run", "b/run", "openai/clip")
    assert short_names(("runs/a", "runs/a/checkpoints/step_000100")) == ("a", "step_000100")


# Table


def write_results(folder: Path, content: dict, name: str = "metrics.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def test_table_gathers_every_kind_of_results(tmp_path, capsys):
    zeroshot = {
        "accuracy": 0.5,
        "top5": 1.0,
        "per_class": {"a": {"f1": 1.0}},
        "prompts": {"ensemble": {"accuracy": 0.1}},
    }
    a = write_results(tmp_path / "a", {"steps": 7, "wall_seconds": 2.5, "eval": {"accuracy": 0.25}}, "summary.json")
    write_results(a / "test", zeroshot)
    b = write_results(tmp_path / "b", zeroshot | {"accuracy": 0.7})
    probe = write_results(tmp_path / "probe", {"knn": {"accuracy": 0.8, "macro_f1": 0.75, "per_class": {}}})
    agnostic = write_results(tmp_path / "agnostic", {"0.07": {"mean_entropy": 1.5, "accuracy": 0.3}})
    retrieval = write_results(tmp_path / "r", {"image_to_text": {"R@1": 0.125, "MRR": 0.2, "median_rank": 4.0}})
    runs = [str(each) for each in (a, b, probe, agnostic, retrieval)]
    assert evaluate.main(["table", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith((str(a / "test"), str(b)))] == [
        ["0.5000", "1.0000"],
        ["0.7000", "1.0000"],
    ]
    for of, cells in (
        ("training", ["0.2500", "7", "2.5000"]),
        ("knn", ["0.8000", "0.7500"]),
        ("0.07", ["0.3000", "1.5000"]),
    ):
        assert [line.split()[2:] for line in lines if line.split()[1:2] == [of]] == [cells]
    assert any("image_to_text" in line and line.endswith("0.1250  0.2000       4.0000") for line in lines)
    assert "0.1000" not in "".join(lines), "what lies below a result is no result of its own"


def test_table_writes_files_and_means_over_seeds(tmp_path, capsys):
    runs = [str(write_results(tmp_path / f"seed{k}", {"accuracy": k / 10, "top5": 1.0})) for k in (1, 2, 6)]
    assert evaluate.main(["table", *runs, "--mean", f"--output-dir={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "\nmean" in printed and "  0.3000  1.0000\n" in printed and "  0.2646  0.0000\n" in printed
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["results"], row["accuracy"]) for row in rows] == list(zip(runs, ["0.1", "0.2", "0.6"], strict=True))
    assert "| mean |  | 0.3000 | 1.0000 |" in (tmp_path / "out" / "table.md").read_text()


def test_table_leaves_folders_without_results_out_and_says_so(tmp_path, capsys):
    run, empty = write_results(tmp_path / "run", {"accuracy": 0.5}), tmp_path / "empty"
    empty.mkdir()
    assert evaluate.main(["table", str(run), str(empty)]) == 0
    printed = capsys.readouterr()
    assert "0.5000" in printed.out and str(empty) not in printed.out
    assert f"warning: {empty} holds no results" in printed.err


def test_a_folder_without_results_is_told_in_one_line(tmp_path, capsys):
    broken = write_results(tmp_path / "broken", {})
    (broken / "metrics.json").write_text("{")
    for run, words in ((tmp_path / "none", "holds no results"), (broken, "cannot be read")):
        assert evaluate.main(["table", str(run)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and str(run) in error and words in error
    assert evaluate.main(["table"]) == 2
    assert "needs folders" in capsys.readouterr().err
