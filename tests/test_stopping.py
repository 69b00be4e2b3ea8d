"""Early stopping, the step where overfitting starts, and a scheduled logit scale."""

import json
import shutil
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from PIL import Image
from small_runs import losses, train

import lib.train
from lib.runs.curve import draw_curve, find_parting
from lib.runs.reporter import read_metrics

DIGITS = "--val-data=digits"  # a test split that was given to choose by


def summary(run) -> dict:
    return json.loads((run / "summary.json").read_text())


def lines(training: list[float], validation: list[float], every: int = 2) -> list[dict]:
    """A metrics.jsonl with an evaluation after so many steps."""
    found = [{"step": step, "loss": loss} for step, loss in enumerate(training, start=1)]
    found += [{"step": every * n, "eval": {"loss": loss}} for n, loss in enumerate(validation, start=1)]
    return found


def test_patience_ends_a_run_that_gets_no_better_and_exports_its_best(tmp_path, capsys):
    run = train(tmp_path / "run", "--steps=30", "--lr=0.3", "--grad-clip=0", "--eval-every=1", "--patience=2", DIGITS)
    found, best = summary(run), summary(run)["best"]
    assert found["stopped_early"] and found["steps"] == best["step"] + 2 < 30
    assert "evaluations in a row were not better than accuracy" in capsys.readouterr().out
    values = [line["eval"]["accuracy"] for line in read_metrics(run) if "eval" in line]
    assert len(values) == found["steps"] and max(values) == values[best["step"] - 1] == best["value"]
    exported = (run / "export" / "model.safetensors").read_bytes()
    assert exported == (run / "checkpoints" / f"step_{best['step']:06d}" / "model.safetensors").read_bytes()
    assert (run / "checkpoints" / f"step_{found['steps']:06d}").is_dir()


@pytest.mark.slow
def test_a_run_out_of_patience_has_nothing_left_to_do_until_it_has_more(tmp_path, capsys):
    flags = ("--steps=12", "--lr=0.3", "--grad-clip=0", "--eval-every=1", DIGITS)
    run = train(tmp_path / "run", *flags, "--patience=2")
    ended = summary(run)["steps"]
    train(run, *flags, "--patience=2", "--resume=auto")
    assert "nothing is left to do; more with a larger --patience" in capsys.readouterr().out
    assert summary(run)["steps"] == ended
    train(run, *flags, "--patience=0", "--resume=auto")
    assert summary(run)["steps"] == 12 and not summary(run)["stopped_early"]
    assert losses(run) == losses(train(tmp_path / "whole", *flags))


def test_patience_counts_across_a_resume(tmp_path):
    flags = ("--steps=12", "--lr=0.3", "--grad-clip=0", "--eval-every=1", "--patience=2", DIGITS)
    whole = train(tmp_path / "whole", *flags)
    last = summary(whole)["steps"]
    broken = Path(shutil.copytree(whole, tmp_path / "broken", symlinks=True))
    shutil.rmtree(broken / "checkpoints" / f"step_{last:06d}")
    (broken / "summary.json").unlink()
    train(broken, *flags, "--resume=auto")
    assert summary(broken)["steps"] == last and losses(broken) == losses(whole)


def evaluations(monkeypatch, *found: tuple[float, float]) -> None:
    """Let evaluations yield these accuracies and losses, one after the other."""
    coming = iter([{"accuracy": accuracy, "loss": loss} for accuracy, loss in found])
    monkeypatch.setattr(lib.train, "validate", lambda *given, **options: next(coming))


def test_of_equal_evaluations_the_later_one_with_the_lower_loss_is_best_across_a_resume(tmp_path, monkeypatch):
    run, flags = tmp_path / "run", ("--eval-every=1", DIGITS)
    evaluations(monkeypatch, (0.5, 3.0), (0.5, 2.0), (0.5, 2.5), (0.5, 2.0), (0.4, 1.0))
    for steps, best in ((1, 1), (2, 2), (3, 2), (4, 4), (5, 4)):
        train(run, *flags, f"--steps={steps}", "--resume=auto")
        assert summary(run)["best"]["step"] == best
    assert summary(run)["best"] == {"step": 4, "metric": "accuracy", "value": 0.5, "loss": 2.0}
    exported = (run / "export" / "model.safetensors").read_bytes()
    assert exported == (run / "checkpoints" / "step_000004" / "model.safetensors").read_bytes()


def test_patience_counts_evaluations_that_are_the_same_and_not_those_with_a_lower_loss(tmp_path, monkeypatch):
    evaluations(monkeypatch, (0.5, 3.0), (0.5, 2.0), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), (0.9, 0.1))
    run = train(tmp_path / "run", "--steps=6", "--eval-every=1", "--patience=2", DIGITS)
    assert (summary(run)["steps"], summary(run)["best"]["step"]) == (5, 5)


def test_losses_part_where_validation_is_least_and_training_goes_on_falling():
    falling = [5.0, 4.0, 3.0, 2.5, 2.0, 1.5]
    assert find_parting(lines(falling, [3.0, 2.5, 2.9])) == {
        "step": 4,
        "training_loss": 2.75,
        "validation_loss": 2.5,
        "last_training_loss": 1.75,
        "last_validation_loss": 2.9,
        "scale": "relative to chance",
    }
    assert find_parting(lines(falling, [3.0, 2.5, 2.51])) is None  # 0.4% is noise
    assert find_parting(lines(falling, [3.0, 2.5, 2.4])) is None
    assert find_parting(lines(falling[::-1], [3.0, 2.5, 2.9])) is None  # both rise: that is divergence
    assert find_parting(lines(falling, [])) is None


@pytest.mark.slow
def test_a_run_that_overfits_says_so_and_marks_it(tmp_path, capsys):
    flags = ("--steps=60", "--lr=3e-3", "--eval-every=4", "--save-every=0", "--positives=pair", "--data")
    run = train(tmp_path / "run", *flags, str(table(tmp_path)), f"--val-data={table(tmp_path, shift=1)}")
    parting = summary(run)["parting"]
    assert parting["validation_loss"] < parting["last_validation_loss"]
    assert parting["training_loss"] > parting["last_training_loss"]
    assert f"overfitting since step {parting['step']}" in capsys.readouterr().out
    assert (run / "loss_curve.png").stat().st_size > 5000


def table(folder, shift: int = 0):
    """Sixteen images with captions; shifted, with those of others: learning the one unlearns the other."""
    rows = ["filename,caption"]
    for number in range(16):
        Image.new("RGB", (32, 32), (16 * number, 255 - 16 * number, 90)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,colour number {(number + 7 * shift) % 16}")
    file = folder / f"captions_{shift}.csv"
    file.write_text("\n".join(rows))
    return file


def test_the_curve_marks_the_parting(tmp_path, monkeypatch):
    marks, draw = [], Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **style: marks.append(x) or draw(self, x, **style))
    draw_curve(lines([5.0, 4.0, 3.0, 2.5, 2.0, 1.5], [3.0, 2.5, 2.9]), tmp_path / "curve.png")
    assert marks == [4, 4]  # in the panel of either loss


def test_the_scale_follows_its_schedule_and_is_not_learned(tmp_path):
    run = train(tmp_path / "run", "--steps=3", "--scale-schedule", "10", "40")
    assert [line["logit_scale"] for line in read_metrics(run)] == pytest.approx([10, 20, 40])
    rest = train(
        tmp_path / "rest", "--steps=3", "--scale-schedule", "10", "40", f"--resume={run}/checkpoints/step_000002"
    )
    assert losses(rest) == losses(run)[2:]
    constant = train(tmp_path / "constant", "--scale-schedule", "5", "5", "--steps=2")
    assert [line["logit_scale"] for line in read_metrics(constant)] == pytest.approx([5, 5])
    learned = train(tmp_path / "learned", "--steps=2")
    assert len({line["logit_scale"] for line in read_metrics(learned)}) == 2
