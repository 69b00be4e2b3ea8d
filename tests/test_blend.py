"""Initial weights of a run, blends and soups: naive sums in float64, exported and compared as a user does it."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from made_classes import COLOURS, make_squares, save_model
from made_data import make_images, make_table
from ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import FLAGS, pair, same, save_encoders, train
from test_backends import KINDS
from torch import Tensor

import evaluate
import train_siglip
from lib.errors import one_line_errors
from lib.evaluation.retrieval_ranks import retrieval_metrics
from lib.evaluation.subject import Subject
from lib.export.__main__ import main
from lib.runs.blend import INITIAL, load_initial
from lib.towers import TwoTowers

ALL_TRAINS = "--freeze=none", "--head-epochs=0"
COUNTS = {"train": dict.fromkeys(COLOURS, 6), "val": dict.fromkeys(COLOURS, 4), "test": dict.fromkeys(COLOURS, 5)}


class Made(NamedTuple):
    """Folders made once: nobody changes them."""

    squares: Path
    encoders: Path
    model: Path
    """a SigLIP"""
    pair: Path
    """a run of a ResNet, whose batch norms count in integers, and a BERT with new heads"""
    twin: Path
    """another one with another rate"""
    stranger: Path
    """a run of the SigLIP"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    squares, encoders = make_squares(folder / "squares", COUNTS), save_encoders(folder / "encoders", layers=1)
    model = save_model(folder / "model") / "export"
    flags = [f"--data={squares}", *pair(encoders, "resnet"), *ALL_TRAINS]
    first = train(folder / "pair", "--lr=0.01", *flags)
    twin = train(folder / "twin", "--lr=0.05", *flags)
    train_siglip.main([*FLAGS, f"--output-dir={folder / 'stranger'}", f"--model={model}", f"--data={squares}"])
    return Made(squares, encoders, model, first, twin, folder / "stranger")


def weights(folder: Path) -> dict[str, Tensor]:
    return TwoTowers.from_pretrained(folder).state_dict()


def trained(run: Path, step: int = 2) -> dict[str, Tensor]:
    return weights(run / "checkpoints" / f"step_{step:06d}")


def naive(first: dict[str, Tensor], second: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) * first + share * second in float64; integers of the second."""
    found = {}
    for name, value in second.items():
        mixed = (1 - share) * first[name].double().numpy() + share * value.double().numpy()
        found[name] = torch.from_numpy(np.asarray(mixed)).float() if value.is_floating_point() else value
    return found


# Initial weights


def test_initial_weights_are_those_that_the_first_step_saw(made):
    """New heads too, and the bias that a sigmoid run solves on its first batch."""
    found = load_initial(made.pair)
    assert found.source == f"{made.encoders / 'resnet'} and {made.encoders / 'bert'}"
    trunk = load_file(made.encoders / "resnet" / "model.safetensors")
    assert all(torch.equal(found.weights[f"image.trunk.{name}"], value) for name, value in trunk.items())
    assert found.weights.keys() == trained(made.pair).keys() and not same(found.weights, trained(made.pair, 1))
    assert load_initial(made.twin).start == found.start, "the same seed draws the same heads"
    own, initial = weights(made.model), load_initial(made.stranger).weights
    differing = {name for name in own if not torch.equal(own[name], initial[name])}
    assert differing == {"logit_bias"} and f"{initial['logit_bias'].item():.3f}" != "0.000"


def test_a_resumed_run_keeps_them_in_its_folder_and_takes_them_to_another(made, tmp_path):
    flags = [
        f"--data={made.squares}",
        *pair(made.encoders, "resnet"),
        "--freeze=none",
        "--head-epochs=0",
        "--lr=0.01",
        "--steps=3",
    ]
    run = shutil.copytree(made.pair, tmp_path / "run", symlinks=True)
    before = (run / INITIAL).stat()
    train(run, "--resume=auto", *flags)
    after = (run / INITIAL).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (tmp_path / "other").mkdir()
    shutil.copy(made.stranger / INITIAL, tmp_path / "other")  # left by a run that ended before its first step
    train(tmp_path / "other", f"--resume={made.pair / 'checkpoints' / 'step_000002'}", *flags)
    (copied, *rest), (own, *of_own) = load_initial(tmp_path / "other"), load_initial(made.pair)
    assert same(copied, own) and rest == of_own


def test_adapters_are_added_to_the_initial_weights_and_a_preset_has_none(made, tmp_path):
    run = train(tmp_path / "lora", f"--model={made.model}", f"--data={made.squares}", "--lora=2", "--lr=0.01")
    assert same(load_initial(run).weights, {k: v for k, v in weights(made.model).items() if k != "logit_bias"})
    main([str(run), "--blend=0.25"])
    assert same(weights(run / "export_blend_0.25"), naive(load_initial(run).weights, trained(run), 0.25))
    (tmp_path / "preset").mkdir()
    shutil.copy(made.stranger / INITIAL, tmp_path / "preset")
    preset = train(tmp_path / "preset", f"--data={made.squares}", "--steps=1")
    assert not (preset / INITIAL).exists()


def sharded(kind: str, *arguments: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(KINDS[kind])
    train(*map(Path, arguments[:1]), *arguments[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_sharded_ranks_store_whole_weights(made, tmp_path, kind):
    flags = [
        f"--data={made.squares}",
        *pair(made.encoders, "resnet"),
        "--freeze=none",
        "--head-epochs=0",
        "--lr=0.01",
        "--chunk-size=4",
    ]
    on_ranks(2, sharded, kind, str(tmp_path / "run"), *flags)
    assert same(load_initial(tmp_path / "run").weights, load_initial(made.pair).weights)
    assert load_initial(tmp_path / "run").start == load_initial(made.pair).start


# Export


def test_blends_and_soups_are_the_naive_sums(made, tmp_path, capsys):
    out = tmp_path / "out"
    initial, final, other = load_initial(made.pair).weights, trained(made.pair), trained(made.twin)
    counts = [name for name, value in final.items() if not value.is_floating_point()]
    assert counts and any(not torch.equal(initial[name], final[name]) for name in counts)
    assert not torch.equal(initial["logit_scale"], final["logit_scale"])
    for share in (0.0, 0.3, 1.0):
        main([str(made.pair), f"--blend={share}", f"--output={out}"])
        assert same(weights(out), naive(initial, final, share))
    # Negative control: the shares exchanged, and the scale itself interpolated instead of its logarithm.
    main([str(made.pair), "--blend=0.3", f"--output={out}"])
    assert not same(weights(out), naive(final, initial, 0.3))
    scale = 0.7 * initial["logit_scale"].double().exp() + 0.3 * final["logit_scale"].double().exp()
    assert abs(weights(out)["logit_scale"] - scale.log()) > 1e-6
    main([str(made.pair), "--soup", str(made.twin), f"--output={out}"])
    assert same(weights(out), naive(other, final, 0.5)) and not same(weights(out), final)
    assert "The trained weights are the mean of 2 runs" in (out / "README.md").read_text()
    run = shutil.copytree(made.pair, tmp_path / "run", symlinks=True)
    main([str(run), "--soup", str(made.twin), "--blend=0.4", "--checkpoint=step_000001"])
    both = naive(initial, naive(trained(made.twin, 1), trained(made.pair, 1), 0.5), 0.4)
    assert same(weights(run / "export_step_000001_soup_blend_0.4"), both)
    card = (run / "export_step_000001_soup_blend_0.4" / "README.md").read_text()
    assert "0.6 x initial weights + 0.4 x trained weights" in card and "## Evaluation" not in card
    assert capsys.readouterr().out.count("largest logit difference") == 6


@pytest.mark.parametrize("form", ["hf", "open_clip", "sentence-transformers", "onnx"])
def test_every_format_takes_a_blend_and_is_checked(made, form, tmp_path, capsys):
    if form in ("open_clip", "sentence-transformers", "onnx"):
        pytest.importorskip({"onnx": "onnxscript"}.get(form, form.replace("-", "_")))
    main([str(made.stranger), "--blend=0.5", f"--format={form}", f"--output={tmp_path / 'out'}"])
    assert float(capsys.readouterr().out.split()[-1]) <= 1e-4
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    blend = naive(load_initial(made.stranger).weights, trained(made.stranger), 0.5)
    assert record["logit_bias"] == blend["logit_bias"].item()
    assert record["logit_scale"] == pytest.approx(blend["logit_scale"].exp().item(), rel=1e-6)


def error_of(capsys, *flags: str | Path) -> str:
    """The one line that the command prints before it exits with 2."""
    with pytest.raises(SystemExit) as ended, one_line_errors():
        main([*map(str, flags)])
    (error,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and error.startswith("error: ")
    return error


def test_faults_of_blends_and_soups_are_one_line(made, tmp_path, capsys):
    run = shutil.copytree(made.pair, tmp_path / "run", symlinks=True)
    bare = shutil.copytree(made.pair, tmp_path / "bare", ignore=shutil.ignore_patterns(INITIAL))
    capsys.readouterr()
    for flags, words in (
        (["--blend=1.5"], "--blend 1.5 must be between 0"),
        (["--blend=nan"], "--blend nan must be between 0"),
        (["--soup", bare], f"{bare} has no initial weights"),
        (["--soup", made.stranger], f"--soup: {run} (from {made.encoders / 'resnet'} and "),
        (["--soup", made.stranger], f"and {made.stranger} (from {made.model}) started from different weights"),
        (["--soup", run], "name each run once"),
        (["--soup", tmp_path / "none"], "is no folder"),
        (["--soup", made.twin, "--checkpoint", made.model], "with --soup choose best, last"),
        (["--blend=0.5", "--checkpoint", made.model], "has the shape"),
        (["--blend=0.5", f"--output={run / 'export'}"], "is the trained model of the run"),
    ):
        assert words in error_of(capsys, run, *flags)
    assert f"{bare} has no initial weights" in error_of(capsys, bare, "--blend=0.5")
    stored = {name: value.clone() for name, value in load_initial(run).weights.items()}
    with safe_open(run / INITIAL, framework="pt") as file:
        metadata = file.metadata()
    stored["logit_scale"] += 1
    save_file(stored, run / INITIAL, metadata)
    assert "holds other bytes than were written; copy it again" in error_of(capsys, run, "--blend=0.5")
    assert not list(run.glob("export_*"))


# Comparison


def compare(run: Path, data: Path, also: str | Path, out: Path, *flags: str) -> dict:
    files = [f"--output-dir={out}", f"--cache-dir={out.parent / 'cache'}", "--workers=0", f"--also={also}"]
    assert evaluate.main(["compare", "--models", str(run), f"--data={data}", *files, *flags]) == 0
    return json.loads((out / "metrics.json").read_text())


def test_each_blend_is_measured_as_its_export_is(made, tmp_path):
    """On the val split of the user's data and on halves of the other data, which has none."""
    images = [f"{number}.png" for number in range(12)]
    make_images(tmp_path, *images)
    rows = [[name, f"a {colour} square"] for name, colour in zip(images, [*COLOURS] * 3, strict=True)]
    captions = make_table(tmp_path / "captions.csv", [["filename", "caption"], *rows])
    shares = (1.0, 0.0, 0.6)
    found = compare(made.pair, made.squares, captions, tmp_path / "out", "--blend", *map(str, shares))
    assert [each["blend"] for each in found["blends"]] == sorted(shares)
    first, blend, whole = found["blends"]
    main([str(made.pair), "--blend=0.6", f"--output={tmp_path / 'export'}"])
    for model, split, figures in (
        (tmp_path / "export", "test", blend["data"]),
        (tmp_path / "export", "val", blend["data"]["validation"]),
        (made.pair, "test", whole["data"]),
    ):
        flags = [f"--model={model}", f"--data={made.squares}", f"--split={split}", "--workers=0"]
        assert evaluate.main(["zeroshot", *flags, f"--output-dir={tmp_path / split}"]) == 0
        expected = json.loads((tmp_path / split / "metrics.json").read_text())
        assert all(figures[key] == expected[key] for key in ("accuracy", "macro_f1"))
    assert first["data"] != whole["data"] and set(first["also"]) == {"R@1", "R@5", "R@10", "validation"}
    means = {each["blend"]: (each["data"]["validation"]["accuracy"] + each["also"]["validation"]["R@1"]) / 2
             for each in found["blends"]}  # fmt: skip
    best = max(means.values())
    assert found["best_blend"] == min(share for share, mean in means.items() if mean == best)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "highest mean of both figures" in page and "one half of" in page and (tmp_path / "out/blends.png").is_file()


def test_halves_have_no_image_in_common_and_recall_is_the_mean_of_both_directions(made, tmp_path, monkeypatch):
    images = [f"{number}.png" for number in range(9)]
    make_images(tmp_path, *images)
    captions = [f"a {[*COLOURS][number % 4]} square {number}" for number in range(9)]
    rows = [["filename", "caption"], *map(list, zip(images, captions, strict=True))]
    table = make_table(tmp_path / "captions.csv", rows)
    seen: list[tuple[list[str], Tensor]] = []
    embed = Subject.embed_images

    def watched(subject: Subject):
        embedded = embed(subject)
        texts = subject.embed_texts(subject.data.captions) if subject.data.captions else torch.empty(0)
        seen.append((subject.data.image_keys, embedded.embeds, texts, subject.data.caption_image))
        return embedded

    monkeypatch.setattr(Subject, "embed_images", watched)
    found = compare(made.pair, table, made.squares, tmp_path / "out", "--blend", "0", "1")
    (test, *embeds), (validation, *_) = seen[0], seen[1]
    assert not set(test) & set(validation) and {len(test), len(validation)} == {4, 5}
    expected = retrieval_metrics(*embeds)
    mean = (expected["image_to_text"]["R@1"] + expected["text_to_image"]["R@1"]) / 2
    assert found["blends"][0]["data"]["R@1"] == pytest.approx(mean)


def test_faults_of_a_comparison_of_blends_are_one_line(made, tmp_path, capsys):
    run, squares = str(made.pair), f"--data={made.squares}"
    (tmp_path / "one" / "red").mkdir(parents=True)
    shutil.copy(next(made.squares.rglob("*.png")), tmp_path / "one" / "red")
    two = ["--blend", "0", "1", f"--also={made.squares}"]
    for flags, words in (
        (["--models", run, squares, "--blend", "0", "1.5", "--also=digits"], "--blend 1.5 must be between 0"),
        (["--models", run, squares, "--blend", "1", "--also=digits"], "--blend needs two or more different numbers"),
        (["--models", run, squares, "--blend", "0", "1"], "add --also OTHER_DATA"),
        (["--models", run, squares, "--also=digits"], "--blend needs two or more different numbers"),
        (["--models", run, str(made.twin), squares, *two], "with --blend name one run"),
        (["--models", str(made.model), squares, *two], "has no initial weights"),
        (["--models", run, squares, "--blend", "0", "1", f"--also={tmp_path / 'gone'}"], "--also"),
        (["--models", run, f"--data={tmp_path / 'one'}", *two], "too few images to choose a blend"),
    ):
        assert evaluate.main(["compare", f"--output-dir={tmp_path / 'out'}", "--workers=0", *flags]) == 2, flags
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and words in error[0] and (words != "--also" or "--data" not in error[0])
