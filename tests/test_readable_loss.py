"""The loss that people read: equal across batch, memory and validation where the model is equally good."""

from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
from made_classes import COLOURS, make_squares
from matplotlib.axes import Axes
from naive import naive_infonce, naive_sigmoid, random_pairs
from small_runs import FLAGS

import train_clip
import train_siglip
from lib.data import open_sources
from lib.data.pairs import same_group_share
from lib.runs.curve import draw_curve, find_parting, loss_figures, loss_words
from lib.runs.reporter import read_metrics

MAINS = {"clip": train_clip.main, "siglip": train_siglip.main}


@pytest.mark.parametrize(("pairs", "remembered", "negatives"), [(3, 0, 0), (8, 5, 0), (8, 5, 4), (6, 0, 2)])
def test_a_model_without_knowledge_has_the_same_figures_at_every_size(pairs, remembered, negatives):
    """At scale 0 each term of the sigmoid loss is log 2, and InfoNCE is the chance level."""
    fresh, zero = random_pairs(pairs, 4, seed=0), torch.zeros((), dtype=torch.float64)
    if negatives:
        fresh = replace(fresh, negative_texts=torch.ones(negatives, 4, dtype=torch.float64))
    memory = random_pairs(remembered, 4, seed=1, first_id=100) if remembered else None
    sizes = pairs, remembered, negatives
    sigmoid = loss_figures("siglip", naive_sigmoid(fresh, memory, zero, zero).item(), *sizes)
    assert sigmoid["loss_per_candidate"] == pytest.approx(log(2)) and sigmoid["loss"] > 2
    infonce = loss_figures("clip", naive_infonce(fresh, memory, zero, zero).item(), *sizes)
    assert infonce["loss"] == pytest.approx(infonce["chance_loss"])


def run(family: str, folder: Path, *flags: str) -> Path:
    MAINS[family]([*FLAGS, "--eval-every=2", "--save-every=0", f"--output-dir={folder}", *flags])
    return folder


def test_steps_and_evaluations_have_the_readable_loss_beside_the_optimized_one(tmp_path, capsys):
    flags = ("--xbm-size=24", "--xbm-start=2", "--freeze=scale")
    sigmoid, infonce = (read_metrics(run(family, tmp_path / family, *flags)) for family in ("siglip", "clip"))
    first, second, evaluation = sigmoid
    assert first["loss_per_candidate"] == pytest.approx(first["loss"] / 16)
    assert second["loss_per_candidate"] == pytest.approx(second["loss"] / 16), "the memory adds no weight"
    assert evaluation["eval"]["loss_per_candidate"] == pytest.approx(evaluation["eval"]["loss"] / 355)
    assert [line.get("eval", line)["chance_loss"] for line in infonce] == pytest.approx([log(16), log(32), log(355)])
    assert not any("chance_loss" in line for line in sigmoid)
    printed = capsys.readouterr()
    assert f", {loss_words(evaluation['eval'])}\n" in printed.out and f"{loss_words(second)}, " in printed.err
    assert loss_words(infonce[1]).endswith(f" (chance {log(32):.4g})") and loss_words(infonce[1]) in printed.err


def test_the_curve_draws_the_readable_loss_and_the_level_of_chance(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *a, **k: drawn.append([*y]) or plot(self, x, y, *a, **k))
    for family, shown in (("siglip", [[2.0, 1.0], [0.5]]), ("clip", [[8.0, 8.0], [log(4), log(8)], [4.0], [log(8)]])):
        steps = [{"step": 1, **loss_figures(family, 8.0, 4)}, {"step": 2, **loss_figures(family, 8.0, 4, 4 // 2)}]
        steps[1] |= loss_figures(family, 8.0, 8)
        drawn.clear()
        draw_curve([*steps, {"step": 2, "eval": loss_figures(family, 4.0, 8)}], tmp_path / "curve.png")
        assert drawn == [pytest.approx(values) for values in shown]


def test_a_memory_that_comes_into_use_does_not_hide_overfitting():
    """InfoNCE over more candidates is higher, though the model became better on its training data."""
    early, late = (4.0, 8), (5.0, 8, 32)
    lines = [{"step": step, **loss_figures("clip", *(early if step < 3 else late))} for step in range(1, 5)]
    lines += [{"step": step, "eval": loss_figures("clip", loss, 8)} for step, loss in ((2, 3.0), (4, 3.5))]
    assert find_parting(lines)["step"] == 2
    plain = [{key: value for key, value in line.items() if key in ("step", "loss")} for line in lines[:4]]
    plain += [{"step": line["step"], "eval": {"loss": line["eval"]["loss"]}} for line in lines[4:]]
    assert find_parting(plain) is None, "the optimized losses do not compare"


def test_the_plan_says_how_many_candidates_are_positives(tmp_path, capsys):
    counts = {"train": {"red": 6, "green": 2}, "test": dict.fromkeys(COLOURS, 1)}
    data = make_squares(tmp_path / "squares", counts)
    assert same_group_share(open_sources(str(data), None, None)[0]) == pytest.approx(0.75**2 + 0.25**2)
    both = open_sources([f"{data}::0.5", "digits::0.5"], None, None)[0]
    of_digits = same_group_share(open_sources("digits", None, None)[0])
    assert same_group_share(both) == pytest.approx((0.625 + of_digits) / 4), "no class is in both"
    flags = (f"--data={data}", "--xbm-size=24", "--steps=1", "--eval-every=0")
    run("siglip", tmp_path / "group", *flags)
    said = "15 fresh and 24 remembered negatives per anchor"
    assert f"{said}; about 25 of the candidates are positives (same class)\n" in capsys.readouterr().out
    run("siglip", tmp_path / "pair", *flags, "--positives=pair")
    assert f"{said}\n" in capsys.readouterr().out, "the diagonal alone"
