"""Low-rank adapters: which weights train, merging, and exact resume."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from small_runs import losses, moved, pair, same, save_encoders, saved, train
from transformers import AutoModel

from lib.errors import InputError
from lib.gradcache.step import cached_step
from lib.runs.reporter import read_metrics
from lib.towers import TwoTowers, build_preset, load_towers
from lib.towers.lora import add_adapters, merge, merged_weights
from lib.towers.trainable import set_trainable

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


def adapted_towers(family: str = "clip") -> TwoTowers:
    towers, _ = build_preset(f"tiny-{family}", ["one two"])
    add_adapters(towers, rank=4, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in towers.named_parameters():
            if "lora_B" in name:  # they start at 0, where adapters change nothing
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return towers


def logits(towers: TwoTowers) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, (4, 7), generator=generator)
    output = towers(torch.rand(4, 3, 32, 32, generator=generator), ids, torch.ones_like(ids))
    return output.logit_scale * output.image_embeds @ output.text_embeds.T


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_adapters_are_on_every_attention_layer_and_the_trunks_own_weights_rest(family):
    towers = adapted_towers(family)
    names = {name.removesuffix("_proj") for name, m in towers.named_modules() if isinstance(m, LoraLayer)}
    assert len(names) == 2 * 2 * len(PROJECTIONS)  # two towers of two blocks
    for name, parameter in towers.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or ".trunk." not in name), name


@torch.no_grad()
def test_merging_gives_the_same_logits_and_the_plain_models_names():
    towers = adapted_towers()
    plain, _ = build_preset("tiny-clip", ["one two"])
    without = logits(plain)
    expected = logits(towers)
    assert (expected - without).abs().max() > 0.1
    weights = merged_weights(towers)
    plain.load_state_dict(weights)
    assert (logits(plain) - expected).abs().max() <= 1e-5
    merge(towers)
    assert not any(isinstance(module, LoraLayer) for module in towers.modules())
    assert same(towers.state_dict(), weights)


def test_bert_vit_and_a_part_of_a_trunk_are_known_by_name(encoders):
    towers, _ = load_towers(
        family="clip", image_tower=str(encoders / "vit"), text_tower=str(encoders / "bert"), image_size=32
    )
    set_trainable(towers, ["text"], ["text.last:1"])
    add_adapters(towers, rank=2, dropout=0.0, seed=0)
    adapted = {name for name, module in towers.named_modules() if isinstance(module, LoraLayer)}
    attention = "text.trunk.encoder.layer.2.attention"
    texts = {f"{attention}.self.{each}" for each in ("query", "key", "value")} | {f"{attention}.output.dense"}
    assert {name for name in adapted if name.startswith("text.")} == texts
    assert len(adapted - texts) == 3 * 4


def test_a_run_trains_adapters_heads_and_scale_and_exports_a_plain_model(tmp_path):
    run = train(tmp_path / "run", "--lora=2", "--weight-decay=0.2")
    names = moved(run, name="weights")
    assert {name for name in names if ".lora_" not in name} == {"image.head.weight", "text.head.weight", "logit_scale"}
    assert len({name for name in names if ".lora_B." in name}) == 2 * 2 * len(PROJECTIONS)
    plain = {name for name in moved(run) if "encoder" in name}
    assert len(plain) == 2 * 2 * len(PROJECTIONS) and all(
        name.removesuffix(".weight").endswith(PROJECTIONS) for name in plain
    )
    exported = load_file(run / "export" / "model.safetensors")
    assert (
        same(exported, saved(run, 2))
        and exported.keys() == AutoModel.from_pretrained(run / "export").state_dict().keys()
    )


def test_a_run_with_adapters_and_dropout_resumes_exactly(tmp_path):
    flags = ("--lora=2", "--dropout=0.3", "--freeze", "text", "--steps=4")
    whole = train(tmp_path / "whole", *flags)
    assert not any(name.startswith("text.") for name in moved(whole, name="weights"))
    rest = train(tmp_path / "rest", *flags, f"--resume={whole / 'checkpoints' / 'step_000002'}")
    assert losses(rest) == losses(whole)[2:]
    for name in ("model", "weights"):
        assert same(saved(rest, 4, name), saved(whole, 4, name))


def test_the_cached_step_replays_the_adapters_dropout(tmp_path):
    train(tmp_path / "run", "--lora=2", "--dropout=0.3", "--verify-gradients", "--steps=1")


@pytest.mark.parametrize(("dropout", "shared"), [(0.0, True), (0.3, False)])
def test_texts_are_encoded_once_only_while_adapters_drop_nothing(dropout, shared, tmp_path, monkeypatch):
    """At the start adapters give 0, with dropout or without."""
    told = []

    def watched(cache, *arguments, **options):
        told.append(cache.share_texts)
        return cached_step(cache, *arguments, **options)

    monkeypatch.setattr("lib.train.cached_step", watched)
    train(tmp_path / "run", "--lora=2", f"--dropout={dropout}", "--steps=1")
    assert told == [shared]


def test_a_checkpoint_with_adapters_starts_another_run_and_is_what_was_evaluated(tmp_path):
    run = train(tmp_path / "run", "--lora=2", "--lr=3e-2", "--eval-every=2")
    model = f"--model={run / 'checkpoints' / 'step_000002'}"
    again = train(tmp_path / "again", model, "--steps=1", "--lr=1e-12", "--eval-every=1")
    first, second = saved(run, 2), saved(again, 1)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    with_adapters, merged = ([e["eval"]["loss"] for e in read_metrics(r) if "eval" in e] for r in (run, again))
    assert merged == pytest.approx(with_adapters, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora=2", "--freeze", "image", "text"), "--lora 2: both trunks are frozen"),
        (("--lora=2", "--freeze", "image", "text", "--unfreeze", "re:text.*norm"), "--lora 2: no attention layer"),
    ],
)
def test_adapters_without_a_place_are_refused(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", *flags)


def test_a_tower_without_attention_is_refused_with_the_remedy(encoders, tmp_path):
    with pytest.raises(InputError, match="--lora 2: .*image tower's ResNetModel.*--freeze image.trunk"):
        train(tmp_path / "run", "--lora=2", *pair(encoders, "resnet"))


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    run = train(tmp_path / "run", "--lora=2", "--steps=1")
    resume = f"--resume={run / 'checkpoints' / 'step_000001'}"
    with pytest.raises(InputError, match="--lora 4 is not that of the checkpoint"):
        train(tmp_path / "other", "--lora=4", resume)


def test_dropout_is_for_adapters_and_mlp_heads_of_pretrained_towers_too(tmp_path, encoders):
    preset = train(tmp_path / "preset", "--steps=1")
    model = f"--model={preset / 'export'}"
    plain, dropped = (
        losses(train(tmp_path / name, model, "--lora=2", "--steps=3", "--lr=0.1", *flags))
        for name, flags in (("plain", ()), ("dropped", ("--dropout=0.5",)))
    )
    assert plain != dropped
    pair = (f"--image-tower={encoders / 'vit'}", f"--text-tower={encoders / 'bert'}", "--image-size=32")
    plain, dropped = (
        losses(train(tmp_path / name, *pair, "--projection=mlp", "--steps=2", *flags))
        for name, flags in (("heads", ()), ("dropped heads", ("--dropout=0.5",)))
    )
    assert plain != dropped
    for number, flags in enumerate(((model,), pair)):
        with pytest.raises(InputError, match="--dropout 0.5 is for the presets .*, for mlp heads and for --lora"):
            train(tmp_path / f"refused {number}", *flags, "--steps=1", "--dropout=0.5")
