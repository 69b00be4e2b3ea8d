"""The moving average of the weights: its value, its statistics, its resume, its evaluation and export."""

import pytest
import torch
from safetensors.torch import load_file
from small_runs import losses, pair, same, save_encoders, saved, train

from lib.backends.optim import WeightAverage
from lib.errors import InputError
from lib.runs.reporter import read_metrics
from lib.towers import TwoTowers, build_preset
from lib.towers.lora import add_adapters

DECAY = 0.7


def average_of(run, step: int) -> dict[str, torch.Tensor]:
    stored = saved(run, step, "average")
    return {name.removeprefix("module."): value for name, value in stored.items() if name != "n_averaged"}


def test_a_run_keeps_the_average_that_a_loop_over_its_steps_gives(tmp_path):
    run = train(tmp_path / "run", f"--ema={DECAY}", "--steps=4", "--lr=1e-2")
    expected = saved(run, 1, "weights")
    for step in (2, 3, 4):
        weights = saved(run, step, "weights")
        expected = {name: DECAY * expected[name] + (1 - DECAY) * weights[name] for name in expected}
    found = average_of(run, 4)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert not same(found, weights)


def test_statistics_are_averaged_and_whole_numbers_copied(tmp_path):
    encoders = save_encoders(tmp_path)
    run = train(tmp_path / "run", f"--ema={DECAY}", "--steps=2", *pair(encoders, "resnet"))
    first, last, found = saved(run, 1, "weights"), saved(run, 2, "weights"), average_of(run, 2)
    means = [name for name in found if name.endswith("running_mean")]
    for name in means:
        torch.testing.assert_close(found[name], DECAY * first[name] + (1 - DECAY) * last[name])
        counter = name.replace("running_mean", "num_batches_tracked")
        assert found[counter] == last[counter]
    assert means


def test_buffers_that_count_positions_stay_whole():
    """A mean of equal integers, cut to an integer, can come out one below."""
    towers, _ = build_preset("tiny-clip", ["one two"])
    average = WeightAverage(towers, 0.9)
    for _ in range(5):
        average.update_parameters(towers)
    positions = [(name, value) for name, value in towers.named_buffers() if not value.is_floating_point()]
    assert positions
    for name, value in positions:
        assert torch.equal(average.module.get_buffer(name), value)


def test_ema_evaluates_and_exports_the_average_and_resumes_exactly(tmp_path):
    """With adapters, the average contains them and they are merged."""
    flags = (f"--ema={DECAY}", "--steps=4", "--lr=1e-2", "--dropout=0.1", "--eval-every=4", "--lora=2")
    whole = train(tmp_path / "whole", *flags)
    average, model = average_of(whole, 4), TwoTowers.from_pretrained(whole / "checkpoints" / "step_000004").state_dict()
    assert same(load_file(whole / "export" / "model.safetensors"), saved(whole, 4))
    assert torch.equal(model["image.head.weight"], average["image.head.weight"])
    assert not torch.equal(model["image.head.weight"], saved(whole, 4, "weights")["image.head.weight"])
    rest = train(tmp_path / "rest", *flags, f"--resume={whole / 'checkpoints' / 'step_000002'}")
    assert losses(rest) == losses(whole)[2:]
    for name in ("model", "weights", "average"):
        assert same(saved(rest, 4, name), saved(whole, 4, name))
    evaluations = [[line["eval"] for line in read_metrics(run) if "eval" in line] for run in (whole, rest)]
    assert evaluations[0] == evaluations[1]
    # The training itself does not feel the average, its evaluation does.
    other = train(tmp_path / "other", *(flag for flag in flags if "ema" not in flag))
    assert losses(other) == losses(whole)
    assert [line["eval"] for line in read_metrics(other) if "eval" in line] != evaluations[0]


def test_an_average_has_the_adapters_of_its_towers():
    towers, _ = build_preset("tiny-clip", ["one two"])
    add_adapters(towers, rank=2, dropout=0.0, seed=0)
    average = WeightAverage(towers, DECAY)
    average.update_parameters(towers)
    assert same(average.module.state_dict(), towers.state_dict())


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--ema=-1",), "--ema -1.0 must be a fraction"), (("--ema=1",), "--ema 1.0 must be below 1")],
)
def test_wrong_settings_are_refused(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", *flags)
