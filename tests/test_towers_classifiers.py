"""Image towers of torchvision and timm, halves of a CLIP, and heads that differ from tower to tower."""

import json
import shutil
import socket
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from made_models import save_family
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models import MobileNet_V3_Small_Weights, get_model
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GLPNImageProcessor,
    ResNetConfig,
    ResNetModel,
)

import train_clip
from lib.config import parse_config
from lib.data import ImagePipeline
from lib.data.pipeline import Resize
from lib.errors import InputError
from lib.towers import TwoTowers, load_towers
from lib.towers.image_form import IMAGENET_MEAN, IMAGENET_STD, ImageForm
from lib.towers.processing import Processing, build_tokenizer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TEXTS = ["a photo of the digit zero", "the digit one"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_family("clip", tmp_path_factory.mktemp("clip")))


def compose(image: str, text: str, **options) -> tuple[TwoTowers, Processing]:
    return load_towers(family="clip", image_tower=image, text_tower=text, **{"image_size": 64, **options})


def pixels(side: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def no_network(*_: object, **__: object) -> None:
    raise urllib.error.URLError("no route to host")


# ---- torchvision ----


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5"]
)
def test_pooled_is_what_the_classifier_would_take(name, clip):
    """Against the input of the last layer of the whole model with the same weights."""
    towers, _ = compose(f"torchvision:{name}:random", clip)
    whole = get_model(name).eval()
    last = [module for module in whole.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    whole.load_state_dict(towers.image.trunk.state_dict(), strict=False)
    seen = []
    last.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    classes = whole(pixels())
    given, output = seen[0]
    assert output.shape[1] == classes.shape[1] == 1000
    pooled = towers(pixels()).image_pooled
    if given.ndim == 4:  # SqueezeNet's classifier is a convolution, with a ReLU and the mean behind it
        given = given.mean(dim=(2, 3))
    torch.testing.assert_close(pooled, given, rtol=1e-5, atol=1e-6)


def test_a_pair_comes_back_without_network_or_cache(clip, tmp_path, monkeypatch):
    towers, processing = compose("torchvision:resnet18:random", f"{clip}#text", projection="mlp", projection_dim=24)
    towers.train()(pixels())  # moves the running statistics: buffers are part of the weights
    towers.eval().save_pretrained(tmp_path)
    processing.save_pretrained(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    loaded, again = TwoTowers.from_pretrained(tmp_path), Processing.from_pretrained(tmp_path)
    tokens = again.tokenize(TEXTS)
    for ours, theirs in zip(towers(pixels(), *tokens), loaded(pixels(), *tokens), strict=True):
        assert torch.equal(ours, theirs)
    assert (again.image_size, again.image_mean, again.image_std) == (64, IMAGENET_MEAN, IMAGENET_STD)
    assert loaded.description["image_config"] == {"model_type": "torchvision", "name": "resnet18"}


def test_the_seed_decides_on_random_weights_and_leaves_the_callers_numbers_alone(clip):
    state = torch.get_rng_state()
    first, again, other = (compose("torchvision:mobilenet_v3_small:random", clip, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("trunk", "head"):
        weights = [torch.cat([p.flatten() for p in getattr(t.image, part).parameters()]) for t in (first, again, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_pretrained_weights_come_from_the_cache(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    name = MobileNet_V3_Small_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    folder = tmp_path / "hub" / "checkpoints"
    with pytest.raises(InputError) as missing:
        compose("torchvision:mobilenet_v3_small", clip)
    for word in (
        "--image-tower torchvision:mobilenet_v3_small:",
        name,
        MobileNet_V3_Small_Weights.DEFAULT.url,
        str(folder),
        ":random",
    ):
        assert word in str(missing.value)
    assert "\n" not in str(missing.value)
    source = get_model("mobilenet_v3_small")
    torch.save(source.state_dict(), folder / name)
    for value in ("torchvision:mobilenet_v3_small", "torchvision:mobilenet_v3_small:IMAGENET1K_V1"):
        towers, processing = compose(value, clip, image_size=None)
        assert torch.equal(towers.image.trunk.features[12][0].weight, source.features[12][0].weight)
        assert (processing.image_size, processing.resize) == (224, Resize("crop", 256, "bilinear"))
        assert (processing.image_mean, processing.image_std) == (IMAGENET_MEAN, IMAGENET_STD)
    (folder / name).write_bytes(b"nothing")
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        compose("torchvision:mobilenet_v3_small", clip)


def test_wrong_names_are_refused_with_a_remedy(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    cases = [
        (
            "torchvision:resnet5",
            "--image-tower torchvision:resnet5: no such model; the nearest is torchvision:resnet50",
        ),
        ("torchvision:resnet18:V3", "resnet18 has the weights IMAGENET1K_V1 and random"),
        ("torchvision:googlenet:random", "more than one classifier"),
        ("timm:resnet18", "--image-tower timm:resnet18: timm is not installed; pip install timm"),
        (f"{clip}#text", "--image-tower .*#text: this is the text half; write .*#image"),
    ]
    for value, message in cases:
        with pytest.raises(InputError, match=message):
            compose(value, clip)
    with pytest.raises(InputError, match="--image-size 64: torchvision:vit_b_32 takes 224"):
        compose("torchvision:vit_b_32", clip)


# ---- timm ----


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_models_of_timm_pool_and_come_back(name, clip, tmp_path):
    timm = pytest.importorskip("timm")
    towers, processing = compose(f"timm:{name}:random", clip)
    output = towers(pixels())
    assert output.image_pooled.shape == (2, timm.create_model(name, num_classes=0).num_features)
    towers.save_pretrained(tmp_path)
    processing.save_pretrained(tmp_path)
    loaded = TwoTowers.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels()).image_embeds, output.image_embeds)
    assert Processing.from_pretrained(tmp_path).image_mean == processing.image_mean
    data = timm.data.resolve_data_config({}, model=towers.image.trunk)
    assert processing.image_mean == tuple(data["mean"]) and processing.image_std == tuple(data["std"])


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A tiny ResNet in the format that timm pushes to the hub; its images are cut out of 44 resized pixels."""
    timm = pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 40, 40], "crop_pct": 0.9, "mean": [0.1, 0.2, 0.3]}
    config["pretrained_cfg"] |= {"interpolation": "bilinear", "std": [0.5, 0.6, 0.7]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("prefix", ["", "timm:local-dir:"])
def test_a_folder_in_timms_format_is_an_image_tower(prefix, timm_folder, clip, tmp_path):
    import timm

    towers, processing = compose(f"{prefix}{timm_folder}", clip, image_size=None)
    model = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(towers(pixels(40)).image_pooled, model(pixels(40)))
    assert (processing.image_size, processing.resize) == (40, Resize("crop", 44, "bilinear"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    picture = Image.effect_noise((61, 47), 60).convert("RGB").resize((183, 141))
    torch.testing.assert_close(processing.image_form.normalized(picture), transform(picture), rtol=0, atol=0.02)
    towers.save_pretrained(tmp_path)
    processing.save_pretrained(tmp_path)
    loaded, again = TwoTowers.from_pretrained(tmp_path), Processing.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels(40)).image_embeds, towers(pixels(40)).image_embeds)
    assert again.image_form == processing.image_form


def test_a_transformer_in_timms_format_is_built_again_as_it_was(clip, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=3, img_size=64, global_pool="avg")
    timm.models.save_for_hf(model, tmp_path / "vit", safe_serialization=True)
    towers, processing = compose(str(tmp_path / "vit"), clip, image_size=96)
    assert processing.resize == Resize("crop", round(168 * 96 / 160))
    towers.save_pretrained(tmp_path / "pair")
    processing.save_pretrained(tmp_path / "pair")
    loaded = TwoTowers.from_pretrained(tmp_path / "pair")
    assert torch.equal(loaded(pixels(96)).image_embeds, towers(pixels(96)).image_embeds)
    assert Processing.from_pretrained(tmp_path / "pair").image_form == processing.image_form
    mean = towers.image.trunk.forward_features(pixels(96))[:, 1:].mean(1)
    torch.testing.assert_close(towers(pixels(96)).image_pooled, towers.image.trunk.fc_norm(mean))


def test_what_is_wrong_with_files_of_timm_is_told_in_one_line(timm_folder, clip, tmp_path):
    for name, content in (("model.safetensors", b"nothing"), ("config.json", b'{"architecture": "resnet5O"}')):
        folder = tmp_path / name
        shutil.copytree(timm_folder, folder)
        (folder / name).write_bytes(content)
        with pytest.raises(
            InputError, match=f"--image-tower timm:local-dir:{folder}: its weights .*timm's format"
        ) as no:
            compose(str(folder), clip)
        assert "\n" not in str(no.value)
    with pytest.raises(InputError, match="--image-tower .*nowhere: its weights cannot be loaded .*nowhere/config.json"):
        compose(f"timm:local-dir:{tmp_path}/nowhere", clip)


def test_real_weights_in_timms_format_see_their_own_pixels(shared, clip):
    timm = pytest.importorskip("timm")
    folder = shared / "weights" / "efficientnet_lite0"
    towers, processing = compose(str(folder), clip, image_size=None)
    assert (processing.image_size, processing.resize) == (224, Resize("crop", 256))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    image = Image.open(sorted((shared / "data" / "coco" / "val2017").iterdir())[0]).convert("RGB")
    theirs = model(transform(image)[None])
    ours = towers(ImagePipeline(224, processing.resize)(image, 0)[None]).image_pooled
    own_form = towers(ImagePipeline(224, "crop")(image, 0)[None]).image_pooled
    assert torch.cosine_similarity(ours, theirs) > 0.999 > 0.99 > torch.cosine_similarity(own_form, theirs)


def test_timm_refuses_what_it_does_not_have(clip, monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no such model; the nearest is timm:resnet50"):
        compose("timm:resnet5O:random", clip)
    with pytest.raises(InputError, match="or end on :random"):
        compose("timm:resnet50:IMAGENET1K_V1", clip)

    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"weights cannot be loaded \(offline\).*HF_HOME.*timm:resnet18:random"):
        compose("timm:resnet18", clip)


# ---- heads ----


@pytest.fixture(scope="module")
def wide_clip(tmp_path_factory):
    """A CLIP whose texts have 512 dimensions, as ViT-B/32's."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = build_tokenizer(TEXTS, max_length=16)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = CLIPConfig(
        text_config=CLIPTextConfig(**sizes, **ids).to_dict(),
        vision_config=CLIPVisionConfig(image_size=32, patch_size=16, **sizes).to_dict(),
        projection_dim=512,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_published_pair_is_a_resnet_with_an_mlp_and_clips_own_text_embeddings(wide_clip):
    towers, processing = compose(
        "torchvision:resnet50:random", f"{wide_clip}#text", projection="mlp", projection_hidden=2048, image_size=32
    )
    layers = [(m.in_features, m.out_features) for m in towers.image.head if isinstance(m, nn.Linear)]
    assert layers == [(2048, 2048), (2048, 512)] and isinstance(towers.image.head[1], nn.GELU)
    assert towers.embed_dim == 512 and towers(pixels(32)).image_pooled.shape == (2, 2048)
    model = CLIPModel.from_pretrained(wide_clip).eval()
    tokens = AutoTokenizer.from_pretrained(wide_clip)(TEXTS, padding=True, return_tensors="pt")
    features = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
    found = towers(None, *processing.tokenize(TEXTS)).text_embeds
    torch.testing.assert_close(found, nn.functional.normalize(features), rtol=0, atol=1e-6)


def test_a_tower_without_a_head_gives_its_pooled_output(clip):
    towers, processing = compose(
        "torchvision:resnet18:random", clip, projection="mlp", text_projection="none", projection_dim=16
    )
    output = towers(None, *processing.tokenize(TEXTS))
    torch.testing.assert_close(output.text_embeds, nn.functional.normalize(output.text_pooled))
    assert not list(towers.text.head.parameters()) and towers.image.head[2].p == 0
    other, _ = compose(
        "torchvision:resnet18:random", clip, projection="none", text_projection="linear", projection_dim=512
    )
    assert not list(other.image.head.parameters()) and other.text.head.out_features == 512


def test_heads_that_do_not_fit_are_refused(clip):
    image = "torchvision:resnet18:random"
    with pytest.raises(
        InputError, match="--projection-dim 100: a tower without a head gives 512 .*--projection-dim 512"
    ):
        compose(image, clip, projection="none", projection_dim=100)
    with pytest.raises(InputError, match="--text-projection mlp: .*#text has its own; leave the flag out"):
        compose(image, f"{clip}#text", text_projection="mlp")


# ---- through the script ----


def test_the_script_trains_the_head_alone_over_a_frozen_resnet_and_clips_texts(clip, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    train_clip.main([
        "--image-tower=torchvision:resnet18:random", f"--text-tower={clip}#text", "--image-size=32",
        "--projection=mlp", "--projection-hidden=32", "--projection-dim=24", "--freeze", "image.trunk", "text",
        "--effective-batch=16", "--chunk-size=8", "--xbm-size=0", "--steps=3", "--eval-every=0", "--save-every=3",
        f"--output-dir={tmp_path}",
    ])  # fmt: skip
    trained = TwoTowers.from_pretrained(tmp_path / "export").state_dict()
    start, _ = compose(
        "torchvision:resnet18:random", f"{clip}#text", projection="mlp", projection_hidden=32, projection_dim=24
    )
    moved = {name for name, value in start.state_dict().items() if not torch.equal(value, trained[name])}
    assert moved and all(name.startswith(("image.head.", "logit_scale")) for name in moved)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_script_trains_resumes_and_exports_a_tower_in_timms_format(timm_folder, clip, tmp_path):
    flags = [
        f"--image-tower={timm_folder}", f"--text-tower={clip}", "--projection-dim=8", "--effective-batch=16",
        "--chunk-size=8", "--xbm-size=0", "--workers=0", "--eval-every=0", "--save-every=1", f"--output-dir={tmp_path}",
    ]  # fmt: skip
    for steps in (1, 2):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_clip.main([*flags, f"--steps={steps}", "--resume=auto"])
    AcceleratorState._reset_state(reset_partial_state=True)
    form = ImageForm(40, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), Resize("crop", 44, "bilinear"))
    for folder in (tmp_path / "checkpoints" / "step_000001", tmp_path / "export"):
        assert Processing.from_pretrained(folder).image_form == form
    first, last = (load_file(tmp_path / "checkpoints" / f"step_00000{n}" / "model.safetensors") for n in (1, 2))
    exported = TwoTowers.from_pretrained(tmp_path / "export").state_dict()
    assert exported.keys() == last.keys() and all(torch.equal(exported[name], last[name]) for name in last)
    assert any(name.startswith("image.trunk.") and not torch.equal(first[name], last[name]) for name in last)


def test_the_script_refuses_images_that_it_cannot_prepare_as_the_model_does(clip, tmp_path):
    image = tmp_path / "image"
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(image)
    GLPNImageProcessor().save_pretrained(image)
    flags = [
        f"--image-tower={image}", f"--text-tower={clip}", "--image-size=32", "--effective-batch=8", "--chunk-size=8",
        "--xbm-size=0", "--workers=0", "--eval-every=0", "--save-every=0", "--steps=1", f"--output-dir={tmp_path}/run",
    ]  # fmt: skip
    with pytest.raises(InputError, match=f"--image-tower {image}: its image processor makes 480 x 992 .*--resize crop"):
        train_clip.main(flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_clip.main([*flags, "--resize=pad"])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert Processing.from_pretrained(tmp_path / "run" / "export").resize == Resize("pad")


# ---- the published experiment ----


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "optimizer", "decay", "augment", "schedule", "unfreeze"),
    [
        ("baseline", 10, 32, "adam", 0, "none", "constant", ()),
        ("regularized", 5, 32, "adamw", 1e-4, "jitter", "constant", ()),
        ("unfrozen", 10, 64, "adam", 0, "none", "cosine", ("image.last:1",)),
    ],
)
def test_the_configs_say_the_published_experiment(name, epochs, batch, optimizer, decay, augment, schedule, unfreeze):
    config = parse_config(train_clip.DEFAULTS, "", ["--config", str(CONFIGS / f"coco_resnet50_{name}.yaml")])
    assert (config.epochs, config.effective_batch, config.lr, config.xbm_size) == (epochs, batch, 1e-4, 0)
    assert (config.optimizer, config.weight_decay, config.augment) == (optimizer, decay, augment)
    assert (config.schedule, config.warmup_steps, config.unfreeze) == (schedule, 0, unfreeze)
    assert config.freeze == ("image.trunk", "text") and config.positives == "pair"
    assert config.image_tower == "torchvision:resnet50" and config.text_tower == "openai/clip-vit-base-patch32#text"
    assert (config.projection, config.projection_hidden, config.projection_dim) == (("mlp",), 2048, 512)
    assert config.dropout == 0
