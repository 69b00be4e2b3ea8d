"""Gradient checkpointing and compiled trunks: the same gradients and losses, dropout included."""

import pytest
import torch
from small_runs import losses, pair, same, save_encoders, saved, train

from lib.errors import InputError
from lib.setup.chunk_memory import measure_activations
from lib.towers import TwoTowers, load_towers
from lib.towers.trainable import set_trainable
from lib.towers.trunk_options import checkpoint_activations, keeping_activations


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


def towers_of(encoders, image: str = "vit") -> TwoTowers:
    towers, _ = load_towers(
        family="clip", image_tower=str(encoders / image), text_tower=str(encoders / "bert"), image_size=32
    )
    return towers.train()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 9, (4, 6), generator=generator)
    pixels = torch.rand(4, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gradients(towers: TwoTowers) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    output = towers(**inputs())
    (output.image_embeds[:, 0].sum() + output.text_embeds[:, 0].sum()).backward()
    return {name: parameter.grad for name, parameter in towers.named_parameters() if parameter.grad is not None}


def test_checkpointing_leaves_gradients_as_they_are_and_saves_activations(encoders):
    plain, checkpointed = towers_of(encoders), towers_of(encoders)
    checkpoint_activations(checkpointed)
    assert measure_activations(checkpointed, inputs()) < measure_activations(plain, inputs()) / 2
    assert same(gradients(checkpointed), gradients(plain))  # BERT drops a tenth of its units


def test_a_run_with_checkpointing_is_the_same_run(encoders, tmp_path):
    """Two chunks, one recomputed and one whose graph is kept; both towers draw dropout masks."""
    flags = (*pair(encoders, "vit"), "--keep-graphs=1", "--optimizer=sgd", "--lr=0.1", "--steps=3")
    plain = train(tmp_path / "plain", *flags)
    checkpointed = train(tmp_path / "checkpointed", *flags, "--gradient-checkpointing")
    assert losses(checkpointed) == losses(plain)
    assert same(saved(checkpointed, 3), saved(plain, 3))


def test_a_tower_that_does_not_offer_it_is_named(encoders, tmp_path, capsys):
    train(tmp_path / "run", *pair(encoders, "resnet"), "--gradient-checkpointing", "--steps=1")
    assert "the image tower does not offer it and keeps its activations" in capsys.readouterr().out
    towers = towers_of(encoders, "resnet")
    assert keeping_activations(towers) == ["image"]
    set_trainable(towers, ["text"])
    with pytest.raises(InputError, match=r"--gradient-checkpointing: no trunk that trains offers it, of ResNetModel"):
        checkpoint_activations(towers)


@pytest.mark.slow
def test_compiled_trunks_give_the_same_losses_and_the_same_names(tmp_path, monkeypatch):
    """Two chunks, one recomputed and one whose graph is kept; the image tower draws dropout masks."""
    compiled_trunks = []
    compile_module = torch.nn.Module.compile

    def counted(module, **options):
        compiled_trunks.append(type(module).__name__)
        compile_module(module, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    shallow = save_encoders(tmp_path, layers=1)
    flags = (*pair(shallow, "vit"), "--keep-graphs=1", "--optimizer=sgd", "--lr=0.1")
    # Stored texts: to compile takes seconds for each form of each trunk.
    flags = (*flags, "--freeze", "text.trunk", f"--cache-dir={tmp_path / 'cache'}")
    plain = train(tmp_path / "plain", *flags)
    monkeypatch.setattr("lib.setup.plan.COMPILER", "aot_eager")
    compiled = train(tmp_path / "compiled", *flags, "--compile")
    assert compiled_trunks == ["ViTModel", "BertModel"]
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-6)
    first, second = saved(plain, 2), saved(compiled, 2)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)


def test_without_a_compiler_the_run_says_so_before_its_first_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    with pytest.raises(InputError, match="--compile: inductor does not work here.*C\\+\\+ comp.*leave --compile out"):
        train(tmp_path / "run", "--compile")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
