"""A model exported for sentence-transformers gives the same embeddings there, without this program."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_exports import COMPOSED, OF_TRANSFORMERS, TEXTS, encoders, logits_of, made_towers, picture, run_example
from made_models import save_family
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor
from transformers import ViTConfig, ViTModel

from lib.errors import InputError, RunError
from lib.export import export, noise_and_texts
from lib.export import sentence_transformers as layout
from lib.export.card import model_card
from lib.export.sentence_transformers import SENTENCE_TRANSFORMERS
from lib.towers import TwoTowers, load_towers
from lib.towers.processing import Processing, build_tokenizer

pytest.importorskip("sentence_transformers.base.modules", reason="needs sentence-transformers, an optional package")

# Run far from the checkout, and without it on the path.
ELSEWHERE = """
import importlib.util
import sys

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

assert importlib.util.find_spec("lib") is None
model = SentenceTransformer(sys.argv[1], device="cpu")
image_embeds = model.encode([Image.open(sys.argv[2]).convert("RGB")])
np.savez(sys.argv[3], image_embeds=image_embeds, text_embeds=model.encode(sys.argv[4:]))
"""


def exported(towers: TwoTowers, processing: Processing, folder: Path, **options) -> float:
    options = {"form": SENTENCE_TRANSFORMERS} | options
    return export(towers, processing, folder, noise_and_texts(processing), **options)


def composed(image_tower: str, text_tower: str, **options) -> tuple[TwoTowers, Processing]:
    """A pair of these encoders with changed weights."""
    towers, processing = load_towers(family="siglip", image_tower=image_tower, text_tower=text_tower, **options)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.mul_(1.01)
    return towers, processing


@pytest.mark.parametrize("kind", [COMPOSED, *OF_TRANSFORMERS])
def test_sentence_transformers_gets_the_same_logits_by_the_example_of_the_card(kind, tmp_path, monkeypatch):
    towers, processing = made_towers(kind, tmp_path / "start")
    card = model_card(tmp_path / "no run", None, towers, processing, SENTENCE_TRANSFORMERS, "export")
    assert exported(towers, processing, tmp_path / "export", card=card) <= 1e-5
    expected = logits_of(towers, processing, picture(tmp_path))
    torch.testing.assert_close(run_example(card, tmp_path, monkeypatch), expected, rtol=0, atol=1e-5)
    assert "library_name: sentence-transformers" in card and "pipeline_tag" not in card


@pytest.mark.slow
def test_a_composed_pair_loads_where_this_program_is_not(tmp_path):
    towers, processing = made_towers(COMPOSED, tmp_path / "start")
    exported(towers, processing, tmp_path / "export")
    image, elsewhere, texts = picture(tmp_path), tmp_path / "elsewhere", [*TEXTS, "one", "a longer text, of 7 words"]
    elsewhere.mkdir()
    script = elsewhere / "script.py"
    script.write_text(ELSEWHERE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    files = [tmp_path / "export", tmp_path / "picture.jpg", elsewhere / "embeds.npz"]
    done = subprocess.run(
        [sys.executable, script, *map(str, files), *texts],
        cwd=elsewhere,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = towers(pil_to_tensor(image)[None], *processing.tokenize(texts))
    found = np.load(elsewhere / "embeds.npz")
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(torch.from_numpy(found[name]), getattr(expected, name), rtol=0, atol=1e-4)
    texts_elsewhere = torch.from_numpy(found["text_embeds"])
    assert (texts_elsewhere.roll(1, 0) - expected.text_embeds).abs().max() > 1e-2  # negative control: other texts


def test_halves_of_dual_encoders_and_heads_of_every_kind_are_written(tmp_path):
    clip, siglip2 = (str(save_family(family, tmp_path / family)) for family in ("clip", "siglip2"))
    bert = encoders(tmp_path)["text_tower"]
    pairs = {
        "own projections": composed(f"{clip}#image", f"{clip}#text", projection_dim=24),
        "no head, linear head": composed(f"{siglip2}#image", bert, projection_dim=16, text_projection="linear"),
        "mlp, no head": composed(f"{clip}#image", bert, projection_dim=24, projection="mlp", text_projection="linear"),
    }
    for name, (towers, processing) in pairs.items():
        assert exported(towers, processing, tmp_path / "export") <= 1e-5, name
    structure = json.loads((tmp_path / "export" / "router_config.json").read_text())["structure"]
    assert [len(structure[side]) for side in ("text", "image")] == [3, 2]  # encoder, pooling, head; own projection


@pytest.mark.parametrize(("name", "image_size"), [("test_resnet", 64), ("test_vit", 96)])
def test_image_towers_of_timm_are_written(name, image_size, tmp_path):
    pytest.importorskip("timm", reason="needs timm, an optional package")
    bert = encoders(tmp_path)["text_tower"]
    towers, processing = composed(f"timm:{name}:random", bert, projection_dim=16, image_size=image_size)
    assert exported(towers, processing, tmp_path / "export") <= 1e-5


def test_no_file_names_a_folder_of_this_machine(tmp_path):
    towers, processing = made_towers(COMPOSED, tmp_path / "start")
    exported(towers, processing, tmp_path / "export")
    for file in (tmp_path / "export").rglob("*.json"):
        assert "/tmp" not in file.read_text() and str(tmp_path) not in file.read_text(), file


@pytest.mark.parametrize(
    ("image", "text", "options", "words"),
    [
        ("torchvision:mobilenet_v3_small:random", "bert", {}, "only this program loads an image tower of torchvision"),
        ("resnet", "siglip#text", {"projection_dim": 16}, "the text tower alone, of type 'siglip_text_model'"),
        ("vit", "bert", {"image_size": 48}, "made for 32 pixels and runs at 48"),
    ],
)
def test_what_sentence_transformers_cannot_load_is_refused(image, text, options, words, tmp_path):
    own = encoders(tmp_path)
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    names = {"resnet": own["image_tower"], "vit": str(tmp_path / "vit"), "bert": own["text_tower"]}
    if text.startswith("siglip"):
        names[text] = f"{save_family('siglip', tmp_path / 'siglip')}#text"
    towers, processing = composed(names.get(image, image), names[text], **{"image_size": 32} | options)
    with pytest.raises(InputError, match=words) as told:
        exported(towers, processing, tmp_path / "export")
    assert "--format onnx" in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "export").exists()


def test_a_tower_that_timm_builds_in_another_shape_is_refused(tmp_path):
    """Like a Swin for another image size, whose windows have other sizes from the start."""
    pytest.importorskip("timm", reason="needs timm, an optional package")
    bert = encoders(tmp_path)["text_tower"]
    towers, processing = composed("timm:test_vit:random", bert, projection_dim=16)
    towers.description["image_config"]["name"] = "test_vit2"
    with pytest.raises(InputError, match="timm builds test_vit2 with weights of other shapes for images of 160 pixels"):
        exported(towers, processing, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_perturbed_weight_is_refused(tmp_path):
    """Negative control: sentence-transformers reads the changed head, and finds other logits."""

    def write(towers, processing, folder):
        layout.write(towers, processing, folder)
        file = folder / "image_3_Dense" / "model.safetensors"
        weights = load_file(file)
        save_file({name: weight * (1 + (weight > 0)) for name, weight in weights.items()}, file)

    towers, processing = made_towers(COMPOSED, tmp_path / "start")
    with pytest.raises(RunError, match="differs from the model"):
        exported(towers, processing, tmp_path / "export", form=replace(SENTENCE_TRANSFORMERS, write=write))
    assert not (tmp_path / "export").exists()


def test_another_tokenizer_is_refused(tmp_path):
    """Negative control: the check of the tokens notices a tokenizer with other words."""

    def write(towers, processing, folder):
        other = build_tokenizer(["many photos of many cats and dogs"] * 9, vocab_size=270)
        layout.write(towers, replace(processing, tokenizer=other), folder)

    towers, processing = made_towers(COMPOSED, tmp_path / "start")
    with pytest.raises(RunError, match="tokenizer gives other tokens"):
        exported(towers, processing, tmp_path / "export", form=replace(SENTENCE_TRANSFORMERS, write=write))
    assert not (tmp_path / "export").exists()
