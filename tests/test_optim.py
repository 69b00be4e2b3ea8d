"""Learning rates of trunks, heads and blocks, weight decay, kinds of optimizer, and a resume at other rates."""

import pytest
import torch
from small_runs import losses, same, saved, train

from lib.backends.optim import Rates, build_optimizer, build_schedule, load_moments, moments_by_name, parameter_groups
from lib.errors import InputError
from lib.runs.reporter import read_metrics
from lib.towers import TwoTowers, build_preset
from lib.towers.trainable import set_trainable


@pytest.fixture
def towers() -> TwoTowers:
    return build_preset("tiny-siglip", ["one two"], use_bias=True)[0]


def by_name(towers: TwoTowers, groups: list[dict], what: str) -> dict[str, float]:
    values = {id(parameter): group[what] for group in groups for parameter in group["params"]}
    return {name: values[id(parameter)] for name, parameter in towers.named_parameters() if parameter.requires_grad}


def test_rates_are_those_of_beit_by_name(towers):
    """The twin counts layers by their names: embeddings 0, blocks 1 and 2, what is behind them 3."""
    rates = Rates(lr=1.0, image_trunk=2.0, text_trunk=3.0, heads=4.0, layer_decay=0.5)
    found = by_name(towers, parameter_groups(towers, rates, 0.1), "lr")
    for name, rate in found.items():
        if name.startswith("logit"):
            expected = 1.0
        elif ".trunk." not in name:
            expected = 4.0
        else:
            layer = 0 if ".embeddings." in name else 1 if ".layers.0." in name else 2 if ".layers.1." in name else 3
            expected = (2.0 if name.startswith("image") else 3.0) * 0.5 ** (3 - layer)
        assert rate == expected, name
    assert len(set(found.values())) == 9  # 0.25 to 3 in the trunks, some of them shared, 1 and 4


def test_matrices_decay_and_nothing_else(towers):
    groups = parameter_groups(towers, Rates(1.0, layer_decay=0.5), 0.1)
    decays = by_name(towers, groups, "weight_decay")
    assert {name for name, decay in decays.items() if decay} == {
        name for name, parameter in towers.named_parameters() if parameter.ndim >= 2
    }
    assert len(parameter_groups(towers, Rates(1.0), 0.1)) == 2  # no more groups than there are kinds


def test_all_groups_follow_one_schedule(towers):
    groups = build_optimizer(towers, "sgd", rates=Rates(1.0, heads=0.1, layer_decay=0.7), weight_decay=0, beta2=0.9)
    schedule = build_schedule(groups, "cosine", 2, 10)
    peaks = torch.tensor([group["initial_lr"] for group in groups.param_groups])
    for _ in range(10):
        shares = torch.tensor([group["lr"] for group in groups.param_groups]) / peaks
        assert torch.allclose(shares, shares[0].expand_as(shares))
        groups.step()
        schedule.step()


def test_moments_find_their_parameters_in_other_groups(towers):
    def stepped(rates: Rates) -> torch.optim.Optimizer:
        return build_optimizer(towers, "adamw", rates=rates, weight_decay=0.1, beta2=0.9)

    first, second = stepped(Rates(1.0)), stepped(Rates(1.0, heads=0.5, layer_decay=0.5))
    for number, parameter in enumerate(towers.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    first.step()
    load_moments(second, towers, moments_by_name(first, towers))
    assert len(second.param_groups) > len(first.param_groups)
    for parameter in towers.parameters():
        assert torch.equal(second.state[parameter]["exp_avg"], first.state[parameter]["exp_avg"])
    assert {group["lr"] for group in second.param_groups} >= {1.0, 0.5}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_each_optimizer_is_torchs(towers, name, kind, fused):
    ours = build_optimizer(towers, name, rates=Rates(0.1), weight_decay=0.3, beta2=0.9, fused=fused)
    twin = torch.nn.Parameter(towers.image.trunk.embeddings.patch_embedding.weight.detach().clone())
    own = towers.image.trunk.embeddings.patch_embedding.weight
    theirs = kind([twin], lr=0.1, weight_decay=0.3, betas=(0.9, 0.9), eps=1e-6)
    for _ in range(3):
        own.grad, twin.grad = own.detach().sin(), twin.detach().sin()
        ours.step()
        theirs.step()
    assert torch.equal(own, twin) or (fused and torch.allclose(own, twin, rtol=1e-6, atol=1e-7))


def test_layer_decay_without_known_blocks_is_refused(towers):
    towers.image.trunk = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="--layer-decay 0.5: the blocks of a Linear are not known.*--freeze image"):
        parameter_groups(towers, Rates(1.0, layer_decay=0.5), 0.1)
    set_trainable(towers, ["image.trunk"])
    parameter_groups(towers, Rates(1.0, layer_decay=0.5), 0.1)


def test_with_sgd_each_part_of_a_run_moves_by_its_own_rate(tmp_path, capsys):
    """From one checkpoint to the next, twice the rate is twice the way."""
    flags = ("--optimizer=sgd", "--weight-decay=0", "--grad-clip=0", "--lr=0.01", "--steps=1")
    start = train(tmp_path / "start", *flags)
    resume = f"--resume={start / 'checkpoints' / 'step_000001'}"
    base = train(tmp_path / "base", *flags, "--steps=2", resume)
    assert "peak learning rates" not in capsys.readouterr().out
    rates = ("--trunk-lr", "0.04", "0.01", "--head-lr=0.02", "--layer-decay=0.5")
    other = train(tmp_path / "other", *flags, "--steps=2", resume, *rates)
    assert "peak learning rates, 0.00125 to 0.04" in capsys.readouterr().out
    weights = [saved(start, 1), saved(base, 2), saved(other, 2)]

    def ratio(name: str) -> float:
        before, moved, others = (each[name] for each in weights)
        return ((others - before).norm() / (moved - before).norm()).item()

    for name, expected in {
        "visual_projection.weight": 2, "text_projection.weight": 2, "logit_scale": 1,
        "vision_model.post_layernorm.weight": 4, "vision_model.encoder.layers.1.mlp.fc1.weight": 2,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 1, "vision_model.embeddings.patch_embedding.weight": 0.5,
        "text_model.final_layer_norm.weight": 1, "text_model.encoder.layers.1.mlp.fc1.weight": 0.5,
        "text_model.encoder.layers.0.mlp.fc1.weight": 0.25, "text_model.embeddings.token_embedding.weight": 0.125,
    }.items():  # fmt: skip
        assert ratio(name) == pytest.approx(expected, rel=2e-2), name


def test_a_run_with_many_rates_resumes_exactly_and_logs_the_highest(tmp_path):
    flags = (
        "--optimizer=adam",
        "--lr=1e-3",
        "--trunk-lr",
        "1e-3",
        "2e-3",
        "--layer-decay=0.8",
        "--dropout=0.1",
        "--steps=4",
    )
    flags = (*flags, "--schedule=cosine")
    whole = train(tmp_path / "whole", *flags)
    rest = train(tmp_path / "rest", *flags, f"--resume={whole / 'checkpoints' / 'step_000002'}")
    assert losses(rest) == losses(whole)[2:]
    assert same(saved(rest, 4), saved(whole, 4))
    rates = [line["lr"] for line in read_metrics(whole) if "lr" in line]
    assert rates[0] == pytest.approx(2e-3, rel=0.15) and rates == sorted(rates, reverse=True)
