"""Trained and frozen weights: parts, last blocks and patterns by name; frozen modules stay in eval mode."""

import pytest
import torch
from small_runs import moved, pair, save_encoders, train
from torch import nn

from lib.errors import InputError
from lib.towers import TwoTowers, load_towers
from lib.towers.trainable import depths, set_trainable

TEXTS = ["a photo of the digit zero", "one two"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


def compose(encoders, image: str = "resnet", text: str = "bert"):
    return load_towers(
        family="siglip", image_tower=str(encoders / image), text_tower=str(encoders / text), image_size=32,
        projection="mlp", projection_dim=24,
    )  # fmt: skip


def preset(family: str) -> TwoTowers:
    return load_towers(model="tiny", family=family, texts=lambda: TEXTS)[0]


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        ("image", ("image.",)),
        ("text", ("text.",)),
        ("image.trunk", ("image.trunk.",)),
        ("text.trunk", ("text.trunk.",)),
        ("image.head", ("image.head.",)),
        ("text.head", ("text.head.",)),
        ("scale", ("logit_scale",)),
        ("bias", ("logit_bias",)),
        ("image.last:1", ("image.trunk.encoder.stages.1.",)),
        ("text.last:2", ("text.trunk.encoder.layer.1.", "text.trunk.encoder.layer.2.")),
        ("re:text.trunk.*LayerNorm", tuple(f"text.trunk.{part}LayerNorm" for part in (
            "embeddings.", *(f"encoder.layer.{n}.{where}output." for n in range(3) for where in ("", "attention."))
        ))),
    ],
)  # fmt: skip
def test_freeze_stops_what_is_named_and_nothing_else(encoders, what, frozen):
    towers, _ = compose(encoders)
    before = trainable(towers)
    set_trainable(towers, [what])
    assert before - trainable(towers) == {name for name in before if name.startswith(frozen)} != set()
    assert towers.image_frozen == (what == "image") and towers.text_frozen == (what == "text")
    assert towers.image_trunk_frozen == (what in ("image", "image.trunk"))
    assert towers.text_trunk_frozen == (what in ("text", "text.trunk"))


def test_unfreeze_comes_after_freeze_and_never_trains_what_no_output_depends_on(encoders):
    towers, _ = compose(encoders, "vit")
    before = trainable(towers)
    assert not any(".pooler." in name for name in before)  # mean pooling and [CLS] leave both poolers out
    set_trainable(towers, ["image", "text.trunk"], ["image.last:1", "re:^text.*bias$", "text"])
    norm = {"image.trunk.layernorm.weight", "image.trunk.layernorm.bias"}
    expected = {name for name in before if not name.startswith("image.")} | norm
    blocks = {name for name in before if name.startswith("image.trunk.layers.2.")}
    assert blocks and trainable(towers) == expected | blocks


def test_the_last_blocks_of_clip_and_siglip_have_the_norm_and_pooler_behind_them():
    for family, behind in (("clip", {"post_layernorm"}), ("siglip", {"post_layernorm", "head"})):
        towers = preset(family)
        set_trainable(towers, ["image", "text", "scale"], ["image.last:1"])
        parts = {name.removeprefix("image.trunk.").split(".")[0] for name in trainable(towers) - {"logit_bias"}}
        assert parts == {"encoder"} | behind
        assert not any(name.startswith("image.trunk.encoder.layers.0") for name in trainable(towers))


def test_an_embedding_is_below_the_blocks_wherever_a_model_lists_it():
    """Like MPNet's relative positions, which follow the layers that share them."""
    trunk = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "positions": nn.Embedding(3, 2)}
    )
    trunk["norm"] = nn.LayerNorm(2)
    numbers = depths(trunk)
    assert [numbers[f"{n}.weight"] for n in ("layers.0", "layers.1", "positions", "norm")] == [1, 2, 0, 3]


def test_freezing_trunk_and_head_freezes_the_tower():
    towers = preset("clip")
    set_trainable(towers, ["text.trunk", "text.head"])
    assert towers.text_frozen and not towers.image_frozen


def test_siglip_texts_have_a_head_and_its_images_none():
    towers = preset("siglip")
    set_trainable(towers, ["text.trunk"])
    assert towers.text_trunk_frozen and not towers.text_frozen
    with pytest.raises(InputError, match="--freeze image.head: .*use --freeze image"):
        set_trainable(towers, ["image.head"])
    set_trainable(towers, ["image.trunk"])
    assert towers.image_frozen


@pytest.mark.parametrize(
    ("freeze", "unfreeze", "message"),
    [
        (["txt.trunk"], [], "--freeze txt.trunk: .*nearest is text.trunk"),
        (["text"], ["text.lasst:1"], "--unfreeze text.lasst:1: .*nearest is text.last:N"),
        (["image.last:4"], [], "--freeze image.last:4: the image tower has 2 blocks"),
        (["image.last:0"], [], "--freeze image.last:0: .*from 1 to 2"),
        (["re:image.*trnk"], [], "--freeze re:image.*trnk: it matches no parameter; the nearest name is "),
        (["re:(image"], [], r"--freeze re:\(image: not a regular expression"),
    ],
)
def test_a_name_that_names_nothing_is_refused_with_the_nearest(freeze, unfreeze, message):
    with pytest.raises(InputError, match=message):
        set_trainable(preset("clip"), freeze, unfreeze)


def test_a_frozen_trunk_stays_in_eval_mode(encoders):
    """Negative control: the same trunk, not frozen, changes its statistics and drops weights."""
    for freeze in (False, True):
        towers, processing = compose(encoders)
        set_trainable(towers, ["image.trunk", "text.trunk"] if freeze else [])
        towers.train()
        before = {name: value.clone() for name, value in towers.image.trunk.named_buffers()}
        inputs = torch.rand(3, 3, 32, 32), *processing.tokenize(TEXTS)
        first, second = towers(*inputs), towers(*inputs)
        unchanged = all(torch.equal(before[name], value) for name, value in towers.image.trunk.named_buffers())
        assert unchanged == freeze
        assert torch.equal(first.text_pooled, second.text_pooled) == freeze
        assert towers.training and towers.image.head.training
        assert towers.image.trunk.training != freeze


def test_in_a_partly_frozen_trunk_only_what_trains_is_in_training_mode(encoders):
    towers, _ = compose(encoders)
    set_trainable(towers, ["image", "text"], ["image.last:1", "text.last:1"])
    towers.train()
    first, second = towers.image.trunk.encoder.stages
    assert not any(module.training for module in [*first.modules(), *towers.image.trunk.embedder.modules()])
    assert all(module.training for module in second.modules())
    layers = towers.text.trunk.encoder.layer
    assert layers[2].output.dropout.training and not layers[1].output.dropout.training
    assert not towers.text.trunk.embeddings.dropout.training and towers.text.trunk.training
    assert not any(module.training for module in towers.eval().modules())


def test_a_run_moves_the_last_block_and_leaves_the_statistics_below_alone(encoders, tmp_path):
    flags = ("--freeze", "image.trunk", "text", "--unfreeze", "image.last:1", *pair(encoders, "resnet"))
    names = moved(train(tmp_path / "run", *flags))
    statistics = {name for name in names if name.endswith(("running_mean", "running_var"))}
    assert statistics and all(name.startswith("image.trunk.encoder.stages.1.") for name in statistics)
    assert {name for name in names if not name.startswith("image.trunk.encoder.stages.1.")} == {
        "image.head.weight", "image.head.bias", "logit_scale"
    }  # fmt: skip


def test_a_partly_frozen_trunk_has_the_gradients_of_plain_autograd(encoders, tmp_path, capsys):
    """--verify-gradients stops the run if pass 2 does not run trained modules."""
    flags = ("--freeze", "image", "text", "--unfreeze", "image.last:1", "re:text.*attention.output.LayerNorm")
    train(tmp_path / "run", *flags, *pair(encoders, "vit"), "--verify-gradients", "--steps=1", "--keep-graphs=1")
    assert "verify-gradients: largest relative difference image tower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--unfreeze", "image.last:1"), "--unfreeze image.last:1 needs --freeze"),
        (("--freeze", "image", "text", "scale"), "--freeze image text scale leaves nothing to train"),
        (("--freeze", "image", "--unfreeze", "re:no_such"), "--unfreeze re:no_such: it matches no parameter"),
    ],
)
def test_wrong_words_stop_a_run_before_its_first_batch(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
