"""Towers exported as ONNX graphs give the same logits in onnxruntime, for any number of pictures and texts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_exports import logits_of, made_towers, picture, run_example

from lib.errors import RunError
from lib.export import export, noise_and_texts, onnx
from lib.export.card import model_card
from lib.export.onnx import ONNX

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, an optional package")
pytest.importorskip("onnxscript", reason="needs onnx and onnxscript, optional packages")

TEXTS = ["one", "a dog runs over the grass", "two", "a photo of the digit zero, and more", "three"]


@pytest.fixture(scope="module", params=["clip", "siglip", "composed"])
def exported(request, tmp_path_factory):
    """Towers, processing and their export; one conversion takes seconds."""
    folder = tmp_path_factory.mktemp("onnx")
    towers, processing = made_towers(request.param, folder / "start")
    card = model_card(folder / "no run", None, towers, processing, ONNX, "export")
    towers.train()
    sample = noise_and_texts(processing)
    assert export(towers, processing, folder / "export", sample, form=ONNX, card=card) <= 1e-5
    assert towers.training
    return towers.eval(), processing, folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnxruntime_gives_the_same_unit_embeddings_at_any_batch(exported, count):
    towers, processing, folder = exported
    image, text = (onnxruntime.InferenceSession(folder / "export" / f"{name}.onnx") for name in ("image", "text"))
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    input_ids, attention_mask = processing.tokenize(TEXTS[:count])
    tokens = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
    given = {each.name: tokens[each.name] for each in text.get_inputs()}
    assert ("attention_mask" in given) == towers.text.masked
    with torch.no_grad():
        expected = towers(pixels, input_ids, attention_mask)
    found = image.run(None, {"pixel_values": pixels.numpy()})[0], text.run(None, given)[0]
    for embeds, name in zip(found, ("image_embeds", "text_embeds"), strict=True):
        torch.testing.assert_close(torch.from_numpy(embeds), getattr(expected, name), rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, rtol=1e-5)


def test_the_example_of_the_card_runs_and_is_true(exported, monkeypatch):
    towers, processing, folder = exported
    expected = logits_of(towers, processing, picture(folder))
    found = run_example((folder / "export" / "README.md").read_text(), folder, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_graph_of_other_weights_is_refused(exported, tmp_path):
    """Negative control: the graphs stay, one weight of the model moves."""
    towers, processing, folder = exported

    def write_older(towers, processing, unfinished):
        for file in (folder / "export").iterdir():
            (unfinished / file.name).write_bytes(file.read_bytes())

    form, sample = replace(ONNX, write=write_older), noise_and_texts(processing)
    assert export(towers, processing, tmp_path / "same", sample, form=form) <= 1e-5
    projection = next(towers.text.head.parameters())
    with torch.no_grad():
        projection[0, 0] += 0.1
    with pytest.raises(RunError, match="differs from the model"):
        export(towers, processing, tmp_path / "other", sample, form=form)
    with torch.no_grad():
        projection[0, 0] -= 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


def test_a_tower_that_cannot_be_converted_is_told_in_one_line(tmp_path):
    class Undecided(torch.nn.Module):
        def forward(self, pixel_values):
            return pixel_values if pixel_values.sum() > 0 else -pixel_values

    with pytest.raises(RunError, match="torch cannot convert the tower of image.onnx") as told:
        onnx._convert(Undecided(), {"pixel_values": torch.zeros(2, 3, 8, 8)}, "image_embeds", tmp_path / "image.onnx")
    assert "\n" not in str(told.value)
