"""Settings that are chosen for the data, and new heads that are trained before the trunks."""

from dataclasses import replace

import pytest
import torch
from made_classes import make_squares
from ranks import on_ranks
from safetensors.torch import load_file
from small_runs import pair, save_encoders, saved

import train_clip
import train_siglip
from lib.config import FITTED
from lib.config.safe_yaml import read_yaml
from lib.errors import InputError
from lib.runs.blend import INITIAL
from lib.runs.reporter import read_metrics
from lib.setup import recipe
from lib.setup.recipe import Facts, fitted

DEFAULTS = {"clip": train_clip.DEFAULTS, "siglip": train_siglip.DEFAULTS}
FACTS = Facts(
    start="heads",
    pairs=2250,
    of_classes=True,
    on_cpu=True,
    operations=1e9,
    convolutional=True,
    batch_norms=True,
    blocks=True,
    storable=True,
)


def choose(family="siglip", facts=FACTS, **given):
    """The values that are chosen, and their lines."""
    config, lines = fitted(replace(DEFAULTS[family], data=("pictures",), **given), family, lambda: facts)
    return {name: getattr(config, name) for name in FITTED}, lines


@pytest.mark.parametrize(("family", "size"), [("clip", 4096), ("siglip", 32768)])
def test_the_digits_keep_the_published_protocol(family, size):
    config, lines = fitted(DEFAULTS[family], family, lambda: pytest.fail("nothing has to be looked at"))
    assert (config.effective_batch, config.xbm_size, config.epochs, config.lr) == (size, size, 30.0, 1e-3)
    assert (config.head_lr, config.freeze, config.augment, config.positives) == (1e-3, (), "none", "group")
    assert not lines
    slower, _ = fitted(replace(DEFAULTS[family], lr=1e-4), family, lambda: FACTS)
    assert slower.head_lr == 1e-4, "heads have --lr unless --head-lr is given"


@pytest.mark.parametrize(
    ("pairs", "batch"),
    [(20, 20), (150, 32), (2250, 32), (11_000, 256), (30_000, 512), (3_000_000, 32768), (None, 32768)],
)
def test_the_batch_leaves_many_steps_to_a_pass_over_the_data(pairs, batch):
    chosen, lines = choose(facts=replace(FACTS, pairs=pairs))
    assert chosen["effective_batch"] == batch
    assert chosen["xbm_size"] == (batch if batch == 32768 else 0)
    assert any(line.startswith(f"--effective-batch {batch}: ") for line in lines)


def test_a_batch_larger_than_the_data_needs_no_memory():
    chosen, _ = choose(effective_batch=32768)
    assert chosen["effective_batch"] == 32768 and chosen["xbm_size"] == 0


def test_the_batch_is_a_multiple_of_the_ranks(monkeypatch):
    monkeypatch.setattr(recipe, "rank_and_world_size", lambda: (0, 3))
    assert choose()[0]["effective_batch"] == 33


def test_new_heads_come_before_a_trunk_that_trains_where_a_cpu_can_afford_it():
    chosen, lines = choose()
    assert chosen["freeze"] == ("text.trunk", "batchnorm") and chosen["head_epochs"] > 0
    assert chosen["lr"] == chosen["head_lr"] == 2e-4 and chosen["augment"] == "light"
    assert len(lines) == len(FITTED), "a line for each choice"
    frozen, lines = choose(facts=replace(FACTS, operations=1e11))
    assert frozen["freeze"] == ("image.trunk", "text.trunk") and frozen["head_epochs"] == 0
    assert frozen["lr"] == 1e-3 and frozen["augment"] == "none"
    assert any("hours on a CPU" in line for line in lines)
    on_gpu = replace(FACTS, operations=1e11, on_cpu=False)
    assert choose(facts=on_gpu)[0]["freeze"] == ("text.trunk", "batchnorm"), "a GPU always can"
    random_heads, _ = choose(facts=replace(FACTS, storable=False))
    assert (random_heads["head_epochs"], random_heads["head_lr"], random_heads["lr"]) == (0, 1e-3, 2e-4)


def test_pretrained_models_change_slowly_and_fresh_ones_do_not():
    chosen, _ = choose(facts=replace(FACTS, start="pretrained", batch_norms=False))
    assert (chosen["lr"], chosen["head_lr"], chosen["freeze"], chosen["head_epochs"]) == (1e-5, 1e-5, (), 0)
    assert chosen["layer_decay"] < 1
    assert choose(facts=replace(FACTS, start="pretrained", blocks=False))[0]["layer_decay"] == 1
    assert choose(facts=replace(FACTS, start="pretrained"), lora=8)[0]["lr"] == 1e-4
    scratch, _ = choose(facts=replace(FACTS, start="scratch"))
    assert (scratch["lr"], scratch["freeze"], scratch["layer_decay"], scratch["epochs"]) == (1e-3, (), 1, 30)


def test_given_flags_stay_and_the_others_follow_them():
    given = {"effective_batch": 64, "freeze": ("image.trunk",), "epochs": 3.0, "augment": "crop"}
    chosen, lines = choose(**given)
    assert given.items() <= chosen.items()
    assert chosen["head_epochs"] == 0 and chosen["lr"] == 1e-3, "only heads train"
    assert not any(line.startswith(("--effective-batch", "--freeze", "--epochs ", "--augment")) for line in lines)
    assert choose(freeze=("none",))[0]["freeze"] == ()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"), layers=1)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return make_squares(tmp_path_factory.mktemp("squares"), {"": {"red": 12, "green": 12, "blue": 12, "dark grey": 12}})


def run(script, folder, squares, encoders, *flags):
    tail = ["--eval-every=0", "--workers=0", f"--cache-dir={folder.parent / 'cache'}", f"--output-dir={folder}"]
    script.main([f"--data={squares}", *pair(encoders, "resnet"), *tail, *flags])
    return folder


@pytest.mark.parametrize("script", [train_clip, train_siglip])
def test_heads_trained_first_are_those_of_a_run_with_frozen_trunks(script, squares, encoders, tmp_path):
    """Negative control: without --head-epochs the first step sees random heads."""
    size = "--effective-batch=16"
    rates = "--lr=1e-4", "--head-lr=1e-2", "--freeze=text.trunk"
    both = run(script, tmp_path / "both", squares, encoders, size, *rates, "--head-epochs=2", "--steps=1")
    random = run(script, tmp_path / "random", squares, encoders, size, *rates, "--head-epochs=0", "--steps=1")
    frozen = "--freeze", "image.trunk", "text.trunk", "--lr=1e-2", "--steps=6", "--save-every=6"
    run(script, tmp_path / "heads", squares, encoders, size, *frozen)
    trained, first, drawn = saved(tmp_path / "heads", 6), load_file(both / INITIAL), load_file(random / INITIAL)
    compared = [name for name in trained if ".head." in name or name.startswith("logit_")]
    assert len(compared) >= 5
    for name in compared:
        torch.testing.assert_close(first[name], trained[name], rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(drawn[name], trained[name], rtol=1e-2) for name in compared)
    losses = [next(line["loss"] for line in read_metrics(each) if "loss" in line) for each in (both, random)]
    assert losses[0] < losses[1]


def heads_of_two_ranks(folder, data, encoders):
    run(train_siglip, folder, data, encoders, "--effective-batch=16", "--head-epochs=2", "--steps=1", "--lr=1e-4")
    return {}


@pytest.mark.slow
def test_heads_that_are_trained_first_do_not_depend_on_the_number_of_ranks(squares, encoders, tmp_path):
    heads_of_two_ranks(tmp_path / "one", squares, encoders)
    on_ranks(2, heads_of_two_ranks, tmp_path / "two", squares, encoders)
    alone, together = (load_file(tmp_path / name / INITIAL) for name in ("one", "two"))
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-6)
    assert any(".head." in name for name in alone)


def test_a_run_without_flags_says_what_it_chose_and_resumes_with_it(squares, encoders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "CPU_BUDGET", 1e20)
    first = run(train_siglip, tmp_path / "run", squares, encoders, "--save-every=2", "--epochs=2")
    said = capsys.readouterr().out
    assert "--effective-batch 32: 48 pairs; a larger batch means fewer updates" in said
    assert "--freeze text.trunk batchnorm: " in said and "--head-epochs" in said
    assert "1 graph kept" in said, "on a CPU nothing is computed twice where memory allows"
    config = read_yaml(first / "config.yaml", "config.yaml")
    assert config["effective_batch"] == 32 and config["freeze"] == ["text.trunk", "batchnorm"]
    norms = {name: value for name, value in saved(first, 3).items() if "normalization" in name}
    assert norms and all(torch.equal(value, load_file(first / INITIAL)[name]) for name, value in norms.items())
    more = [f"--output-dir={first}", "--resume=auto", "--epochs=4", "--save-every=2"]
    monkeypatch.setattr(recipe, "STEPS_A_PASS", 1)  # the rules of a later version: the checkpoint's choices hold
    run(train_siglip, first, squares, encoders, *more[1:])
    assert read_yaml(first / "config.yaml", "config.yaml")["effective_batch"] == 32
    assert len([line for line in read_metrics(first) if "loss" in line]) == 6


def test_freeze_refuses_words_that_stand_alone(squares, tmp_path):
    with pytest.raises(InputError, match="--freeze auto text: auto stands alone"):
        train_clip.main([f"--data={squares}", "--freeze", "auto", "text", f"--output-dir={tmp_path}"])
