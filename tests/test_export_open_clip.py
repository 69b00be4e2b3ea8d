"""A CLIP or SigLIP exported for open_clip gives the same logits there, from the same pictures and texts."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from made_exports import logits_of, made_towers, picture, run_example
from made_models import save_family
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from lib.data.pipeline import Resize
from lib.errors import InputError, RunError
from lib.export import export, noise_and_texts
from lib.export import open_clip as layout
from lib.export.card import model_card
from lib.export.open_clip import OPEN_CLIP
from lib.towers import TwoTowers
from lib.towers.image_form import DEFAULT_FORMS
from lib.towers.processing import Processing

open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch, an optional package")
timm = pytest.importorskip("timm", reason="needs timm, an optional package")


@pytest.mark.parametrize("kind", ["clip", "clip with bias", "siglip", "siglip without bias"])
def test_open_clip_gets_the_same_logits_by_the_example_of_the_card(kind, tmp_path, monkeypatch):
    towers, processing = made_towers(kind, tmp_path / "start")
    card = model_card(tmp_path / "no run", None, towers, processing, OPEN_CLIP, "export")
    difference = export(towers, processing, tmp_path / "export", noise_and_texts(processing), form=OPEN_CLIP, card=card)
    assert difference <= 1e-5
    expected = logits_of(towers, processing, picture(tmp_path))
    torch.testing.assert_close(run_example(card, tmp_path, monkeypatch), expected, rtol=0, atol=1e-5)
    monkeypatch.chdir(tmp_path / "export")  # timm reads the shape of a SigLIP's image tower from the folder it is in
    model = open_clip.create_model("local-dir:.")
    assert (model.logit_bias is not None) == towers.use_bias


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("way", ["crop", "squash", "pad"])
def test_pictures_become_square_in_the_same_way(way, interpolation, tmp_path):
    towers, start = made_towers("clip", tmp_path / "start")
    processing = replace(start, resize=Resize(way, None, interpolation))
    export(towers, processing, tmp_path / "export", noise_and_texts(processing), form=OPEN_CLIP)
    _, prepare = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'export'}")
    wide = picture(tmp_path).resize((96, 64))
    found = prepare(wide)

    def apart(**changes: str) -> float:
        other = replace(processing, resize=replace(processing.resize, **changes)).image_processor()
        return (found - other(wide, return_tensors="pt")["pixel_values"][0]).abs().mean()

    assert apart() < 0.02  # two libraries interpolate
    assert apart(way={"crop": "squash", "squash": "pad", "pad": "crop"}[way]) > 0.2
    assert apart(interpolation={"bicubic": "bilinear", "bilinear": "bicubic"}[interpolation]) > 0.02


@pytest.mark.parametrize("resize", [Resize("crop", 36), Resize(interpolation="lanczos")])
def test_what_open_clip_does_not_do_to_images_is_refused(resize, tmp_path):
    towers, processing = made_towers("clip", tmp_path / "start")
    processing = replace(processing, resize=resize)
    with pytest.raises(InputError, match=f"open_clip cannot make images of 32 pixels by {resize}; use --format hf"):
        export(towers, processing, tmp_path / "export", noise_and_texts(processing), form=OPEN_CLIP)
    assert not (tmp_path / "export").exists()


def test_openais_own_form_with_its_tokenizer_agrees_with_open_clips(shared, tmp_path):
    """gelu as OpenCLIP trains, number 2 for the end token as OpenAI's old files have it, and the real vocabulary."""
    tokenizer = CLIPTokenizer.from_pretrained(shared / "weights" / "clip_tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"hidden_act": "gelu", "layer_norm_eps": 1e-4}
    text = sizes | {"vocab_size": 49408, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(tmp_path / "start")
    form = replace(DEFAULT_FORMS["clip"], size=32)
    processing = Processing(tokenizer, 77, "longest", False, 32, form.mean, form.std, Resize("crop"), "clip")
    processor = processing.image_processor()
    CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path / "start")
    towers, processing = TwoTowers.from_pretrained(tmp_path / "start"), Processing.from_pretrained(tmp_path / "start")
    export(towers, processing, tmp_path / "export", noise_and_texts(processing), form=OPEN_CLIP)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").eval()
    texts = ["a photo of a cat", "Two dogs, running! And a much longer sentence behind them."]
    with torch.no_grad():
        expected = towers(None, *processing.tokenize(texts)).text_embeds
        for tokenize in (open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}"), open_clip.SimpleTokenizer()):
            found = model.encode_text(tokenize(texts), normalize=True)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_perturbed_weight_is_refused(tmp_path):
    """Negative control: open_clip itself reads the changed file, and finds other logits."""

    def write(towers, processing, folder):
        layout.write(towers, processing, folder)
        weights = load_file(folder / "open_clip_model.safetensors")
        weights["visual.transformer.resblocks.0.attn.in_proj_weight"] *= 2
        save_file(weights, folder / "open_clip_model.safetensors")

    towers, processing = made_towers("clip", tmp_path / "start")
    with pytest.raises(RunError, match="differs from the model"):
        export(
            towers,
            processing,
            tmp_path / "export",
            noise_and_texts(processing),
            form=replace(OPEN_CLIP, write=write),
        )
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_on_the_hub_the_tokenizer_is_that_of_the_repository(kind, tmp_path):
    towers, processing = made_towers(kind, tmp_path / "start")
    form = replace(OPEN_CLIP, write=partial(layout.write, repository="me/model"))
    export(towers, processing, tmp_path / "export", noise_and_texts(processing), form=form)
    settings = json.loads((tmp_path / "export" / "open_clip_config.json").read_text())
    assert settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "me/model"
    assert settings["model_cfg"]["vision_cfg"].get("timm_model_name") == {"siglip": "hf-hub:me/model"}.get(kind)
    usage = OPEN_CLIP.usage(towers, processing, "me/model", True)
    assert 'get_tokenizer("hf-hub:me/model")' in usage and 'create_model_from_pretrained("hf-hub:me/model")' in usage


@pytest.mark.parametrize(
    ("kind", "part", "change", "words"),
    [
        ("siglip2", None, {}, "of type 'siglip2': use --format hf, onnx or sentence-transformers"),
        (
            "siglip",
            "text_config",
            {"hidden_act": "relu"},
            r"activations gelu_pytorch_tanh \(images\) and relu \(texts\)",
        ),
        ("siglip", "vision_config", {"layer_norm_eps": 1e-5}, "layer norms of images with an epsilon of 1e-05"),
        ("clip", "text_config", {"hidden_act": "gelu"}, r"activations quick_gelu \(images\) and gelu \(texts\)"),
        ("clip", "vision_config", {"num_channels": 4}, "images of 4 channels"),
    ],
)
def test_what_open_clip_cannot_express_is_refused(kind, part, change, words, tmp_path):
    towers, processing = made_towers(kind, tmp_path / "start")
    if part:
        towers.description[part] |= change
    with pytest.raises(InputError, match=words):
        export(towers, processing, tmp_path / "export", noise_and_texts(processing), form=OPEN_CLIP)
    assert not (tmp_path / "export").exists()


# ---- timm's names of SigLIP's image towers ----


def test_a_siglip_whose_image_tower_timm_knows_loads_by_that_name(tmp_path, monkeypatch):
    """The name implies the shape: no other file and no folder is needed."""

    name, transformer = "vit_test_patch8_siglip_32", timm.models.VisionTransformer

    def create(pretrained=False, global_pool="map", num_classes=0, **settings):
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
        return transformer(**shape, class_token=False, global_pool=global_pool, num_classes=num_classes)

    monkeypatch.setitem(timm.models._registry._model_entrypoints, name, create)
    monkeypatch.setitem(layout.TIMM_SIZES, (16, 2, 2, 32), "test")
    path = save_family("siglip", tmp_path / "start")
    settings = json.loads((path / "config.json").read_text())
    settings["vision_config"]["hidden_act"] = "gelu"  # as timm's
    (path / "config.json").write_text(json.dumps(settings))
    towers, processing = TwoTowers.from_pretrained(path), Processing.from_pretrained(path)
    difference = export(towers, processing, tmp_path / "export", noise_and_texts(processing), form=OPEN_CLIP)
    assert difference <= 1e-5 and not (tmp_path / "export" / "config.json").exists()
    written = json.loads((tmp_path / "export" / "open_clip_config.json").read_text())["model_cfg"]
    assert written["vision_cfg"]["timm_model_name"] == name
    assert "vision_cfg" not in OPEN_CLIP.usage(towers, processing, "export", False)


@pytest.mark.parametrize(
    ("activation", "size", "patch", "side", "name"),
    [
        ("gelu", "base", 16, 224, "vit_base_patch16_siglip_224"),
        ("gelu_pytorch_tanh", "base", 16, 224, None),  # timm's has the exact GELU
        ("gelu_pytorch_tanh", "base", 32, 256, "vit_base_patch32_siglip_256"),
        ("gelu", "base", 32, 256, None),
        ("gelu", "base", 16, 240, None),
    ],
)
def test_the_name_is_that_of_a_model_with_the_same_activation_and_image_size(activation, size, patch, side, name):
    (shape,) = (shape for shape, word in layout.TIMM_SIZES.items() if word == size)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision = dict(zip(keys, shape, strict=True)) | {"hidden_act": activation, "patch_size": patch, "image_size": side}
    assert layout.timm_name(vision) == name
