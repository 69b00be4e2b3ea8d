"""Checkpoints of open_clip as --model: the same embeddings of images and texts as open_clip's own."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from made_exports import made_towers
from made_hub import offline_cache, publish
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5Tokenizer

from lib.errors import InputError
from lib.towers import TwoTowers, load_towers
from lib.towers.open_clip_files import from_open_clip, to_open_clip
from lib.towers.processing import Processing, build_tokenizer

open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch, an optional package")
timm = pytest.importorskip("timm", reason="needs timm, an optional package")

TEXTS = ["a photo of a cat", "Two dogs, running in the snow! And more words than fit into sixteen tokens of text."]
TINY_VIT = "vit_tiny_patch8_siglip_32"
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 2, "mlp_ratio": 3.0}
OF_FOLDER = {"hf_tokenizer_name": "tokenizer"}  # in a local folder, open_clip takes the files there instead
SIGLIP_TEXT = TEXT | {
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
    "norm_kwargs": {"eps": 1e-6},
    "tokenizer_kwargs": {"clean": "canonicalize"},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_vit():
    """A small image tower in timm's own list, where open_clip looks for it by name."""
    if timm.is_model(TINY_VIT):
        return

    def vit_tiny_patch8_siglip_32(pretrained: bool = False, **options) -> timm.models.VisionTransformer:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
        model = timm.models.VisionTransformer(**sizes, num_classes=0, global_pool=options["global_pool"])
        model.default_cfg = model.pretrained_cfg = {"input_size": (3, 32, 32)}
        return model

    vit_tiny_patch8_siglip_32.__module__ = "timm.models.vision_transformer"
    timm.models.register_model(vit_tiny_patch8_siglip_32)


def write(folder: Path, model: torch.nn.Module, settings: dict, tokenizer=None, pickled: bool = False) -> Path:
    """The files that open_clip's push_to_hf_hub leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if pickled:
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    else:
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    form = asdict(open_clip.transform.PreprocessCfg(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)))
    content = {"model_cfg": settings, "preprocess_cfg": form}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def clip(folder: Path, tokenizer=None, text: dict | None = None, pickled: bool = False, **settings) -> Path:
    own = build_tokenizer(TEXTS, max_length=16) if tokenizer is None else tokenizer
    ids = {"vocab_size": len(own), "pool_type": "eos", "eos_id": own.eos_token_id} | OF_FOLDER
    settings = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT | ids | (text or {})} | settings
    custom = settings.get("custom_text", False)
    wanted = {key: value for key, value in settings.items() if key != "custom_text"}
    torch.manual_seed(0)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**wanted)
    return write(folder, model, settings, own, pickled)


def siglip(folder: Path, **text) -> Path:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -1.0),
        *((c, -2.0) for c in "abcdefghijklmnopqrstuvw"),
    ]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, pad_token="</s>", model_max_length=16)
    settings = {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "timm_model_name": TINY_VIT, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": SIGLIP_TEXT | OF_FOLDER | {"vocab_size": len(tokenizer)} | text,
    }
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**{key: value for key, value in settings.items() if key != "custom_text"})
    return write(folder, model, settings, tokenizer)


def agree(folder: Path, towers: TwoTowers, processing: Processing, tolerance: float = 1e-5) -> None:
    """Images and texts as open_clip's users prepare them, and ours as training does."""
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.stack([prepare(Image.fromarray(image.numpy())) for image in pixels])
    with torch.no_grad():
        expected_images = model.eval().encode_image(images, normalize=True)
        expected_texts = model.encode_text(tokenize(TEXTS), normalize=True)
        found = towers(pixels.permute(0, 3, 1, 2), *processing.tokenize(TEXTS))
    torch.testing.assert_close(found.image_embeds, expected_images, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.text_embeds, expected_texts, rtol=0, atol=tolerance)
    assert found.logit_scale.item() == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert found.logit_bias.item() == pytest.approx(0 if model.logit_bias is None else model.logit_bias.item())


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_clip_embeds_as_in_open_clip(quick_gelu, pickled, tmp_path):
    folder = clip(tmp_path / "model", quick_gelu=quick_gelu, pickled=pickled)
    towers, processing = load_towers(family="clip", model=str(folder))
    agree(folder, towers, processing)
    assert processing.max_length == 16 and processing.image_mean == (0.4, 0.5, 0.6) and processing.resize.way == "crop"
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["quick_gelu"] = not quick_gelu  # the control: the activation matters
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(AssertionError):
        agree(folder, towers, processing)


def test_a_clip_with_a_text_module_of_its_own_a_bias_and_another_activation(tmp_path):
    text = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}
    folder = clip(tmp_path / "model", text=text, custom_text=True, init_logit_bias=-5.0)
    vision = VISION | {"norm_kwargs": {"eps": 1e-4}}
    towers, processing = TwoTowers.from_pretrained(folder), Processing.from_pretrained(folder)
    agree(folder, towers, processing)
    assert towers.use_bias and towers.pretrained_bias
    folder = clip(tmp_path / "other", vision_cfg=vision)
    agree(folder, *load_towers(family="clip", model=str(folder)))


@pytest.mark.parametrize("activation", [{}, {"act_kwargs": {"approximate": "tanh"}}])
def test_a_siglip_embeds_as_in_open_clip_and_keeps_its_texts_canonical(activation, tmp_path):
    folder = siglip(tmp_path / "model", **activation)
    towers, processing = load_towers(family="siglip", model=str(folder))
    agree(folder, towers, processing)
    assert processing.padding == "max_length" and towers.pretrained_bias
    spelled, plain = processing.tokenize([" A  CAT_sat, here!", "a cat sat here"])[0]
    assert torch.equal(spelled, plain)
    towers.save_pretrained(tmp_path / "again")
    processing.save_pretrained(tmp_path / "again")
    loaded, again = TwoTowers.from_pretrained(tmp_path / "again"), Processing.from_pretrained(tmp_path / "again")
    agree(folder, loaded, again)
    plain_user = AutoTokenizer.from_pretrained(tmp_path / "again")
    tokens = plain_user(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(tokens, processing.tokenize(TEXTS)[0])


def test_without_a_tokenizer_it_is_that_of_open_clips_package(tmp_path):
    settings = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT | {"vocab_size": 49408}}
    folder = write(tmp_path / "model", open_clip.CLIP(**settings), settings)
    towers, processing = load_towers(family="clip", model=str(folder))
    agree(folder, towers, processing)
    texts = ["It's 2 o'clock: ÜBER façade 写真 🐕", "x" * 50, "  spaces\tand\nlines  ", "don't 1234"]
    expected = open_clip.SimpleTokenizer(context_length=16)(texts)
    found, mask = processing.tokenize(texts)
    assert torch.equal(found * mask, expected[:, : found.shape[1]])  # open_clip pads with 0


def test_by_hub_id_and_as_halves(tmp_path, monkeypatch):
    cache = offline_cache(tmp_path / "hub", monkeypatch)
    folder = publish(clip(tmp_path / "model"), "me/open", cache)
    towers, processing = load_towers(family="clip", model="me/open")
    agree(folder, towers, processing)
    pair = {"image_tower": "me/open#image", "text_tower": "me/open#text", "projection_dim": 24}
    halves, same = load_towers(family="clip", **pair)
    assert same.image_mean == (0.4, 0.5, 0.6)
    inputs = torch.rand(2, 3, 32, 32), *processing.tokenize(TEXTS)
    for ours, theirs in zip(halves(*inputs)[:2], towers(*inputs)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["clip with bias", "siglip"])
def test_our_own_export_for_open_clip_loads_again(kind, tmp_path):
    from lib.export import export, noise_and_texts
    from lib.export.open_clip import OPEN_CLIP

    towers, processing = made_towers(kind, tmp_path / "start")
    export(towers, processing, tmp_path / "export", noise_and_texts(processing), form=OPEN_CLIP)
    loaded, again = load_towers(family="siglip", model=str(tmp_path / "export"))
    assert loaded.logit_bias.item() == towers.logit_bias.item() != 0
    for name, value in towers.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(again.tokenize(TEXTS)[0], processing.tokenize(TEXTS)[0])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_names_lead_both_ways(kind, tmp_path):
    folder = (clip if kind == "clip" else siglip)(tmp_path / "model")
    theirs = open_clip.create_model(f"local-dir:{folder}").state_dict()
    ours = TwoTowers.from_pretrained(folder).state_dict()
    found = to_open_clip(ours, kind)
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], value) for name, value in theirs.items())
    assert from_open_clip(theirs, kind).keys() == ours.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"layers": [1, 1, 1, 1]}}, r"vision_cfg.layers = \[1, 1, 1, 1\]"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type = 'avg'"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value = 0.1"),
        ({"vision_cfg": {"timm_model_name": "resnet50"}}, "vision_cfg"),
        ({"text_cfg": {"no_causal_mask": True}}, "text_cfg.no_causal_mask = True"),
        ({"text_cfg": {"hf_model_name": "bert-base-uncased"}}, "text_cfg.hf_model_name"),
        ({"text_cfg": {"embed_cls": True}}, "text_cfg.embed_cls"),
        ({"multimodal_cfg": {"layers": 2}}, "model_cfg.multimodal_cfg"),
        ({"vision_cfg": {"image_size": [32, 64]}}, "not square"),
        ({"vision_cfg": {"layers": 3}}, "the files lack 16 of the model's weights"),
        ({"vision_cfg": {"layers": 1}}, "encoder.layers.1.*does not mention"),
        ({"vision_cfg": {"patch_size": 16}}, "is of shape"),
    ],
)
def test_a_model_that_transformers_cannot_express_is_refused(change, words, tmp_path):
    folder = clip(tmp_path / "model")
    content = json.loads((folder / "open_clip_config.json").read_text())
    for part, values in change.items():
        content["model_cfg"][part] = content["model_cfg"].get(part, {}) | values
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=words) as error:
        load_towers(family="clip", model=str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_missing_files_and_packages_are_named(tmp_path, monkeypatch):
    settings = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT | {"vocab_size": 49408}}
    folder = write(tmp_path / "model", open_clip.CLIP(**settings), settings)
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(InputError, match="pip install open_clip_torch"):
        load_towers(family="clip", model=str(folder))
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="no file named open_clip_model.safetensors or open_clip_pytorch_model.bin"):
        load_towers(family="clip", model=str(folder))
    other = siglip(tmp_path / "siglip")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        load_towers(family="siglip", model=str(other))
