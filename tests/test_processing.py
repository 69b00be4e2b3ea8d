"""Texts and images are given to a model in one form only, the one that its exported files state too."""

import json
import pickle
import random
import re
import string
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
    CLIPConfig,
    GemmaTokenizer,
    SiglipConfig,
)

from lib.data.pipeline import Resize
from lib.errors import InputError
from lib.towers import build_preset
from lib.towers import processing as processing_module
from lib.towers.image_form import DEFAULT_FORMS
from lib.towers.processing import MAX_CHARACTERS, Processing, build_tokenizer, canonical_form, make_processing

TEXTS = ["a photo of the digit zero", "the digit one, drawn by hand", "a dog runs over the grass"]
FAMILIES = ("clip", "siglip")


def settings(processing: Processing) -> dict:
    return {field.name: getattr(processing, field.name) for field in fields(processing) if field.name != "tokenizer"}


def same_tokens(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A tiny model's processing and the folder that it and the model were saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    towers, processing = build_preset(f"tiny-{request.param}", TEXTS)
    towers.save_pretrained(folder)
    processing.save_pretrained(folder)
    return processing, folder


def test_the_same_texts_give_the_same_tokenizer():
    first, second, other = (build_tokenizer(texts) for texts in (TEXTS, list(TEXTS), TEXTS[:1]))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert first.backend_tokenizer.to_str() != other.backend_tokenizer.to_str()


@pytest.mark.parametrize("text", ["Ein Häschen läuft", "写真", "🐕 emoji", "tabs\tand\nlines", "x" * 20, ""])
def test_any_text_can_be_encoded_and_read_back(text):
    tokenizer = build_tokenizer(TEXTS, max_length=200)
    tokens = tokenizer(text)["input_ids"]
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    read_back = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert read_back == " ".join(text.lower().split())


def test_a_tokenizer_without_training_texts_still_encodes():
    assert len(build_tokenizer([])("digit")["input_ids"]) == len(" digit") + 2


def test_vocabulary_and_special_tokens_are_within_the_model():
    towers, processing = build_preset("tiny-clip", TEXTS)
    config = towers.description["text_config"]
    tokenizer = processing.tokenizer
    assert config["eos_token_id"] == tokenizer.eos_token_id != 2  # 2 selects a legacy way of pooling
    assert (config["pad_token_id"], config["bos_token_id"]) == (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
    )
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert len(tokenizer) == config["vocab_size"] <= 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_are_cut_and_keep_their_end_token(family):
    _, processing = build_preset(f"tiny-{family}", TEXTS)
    input_ids, attention_mask = processing.tokenize(["word " * 200, "word"])
    longest = processing.max_length
    assert input_ids.shape == attention_mask.shape == (2, longest)
    assert input_ids.dtype == attention_mask.dtype == torch.int64
    assert input_ids[0, -1] == processing.tokenizer.eos_token_id
    assert attention_mask.sum(1).tolist() == [longest, processing.tokenize(["word"])[1].sum().item()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_of_a_very_long_text_changes_no_token(family, monkeypatch):
    _, processing = build_preset(f"tiny-{family}", TEXTS)
    pieces = ["word", "a", "...", "é", "写真", "12", "\n", "  ", "x" * 300]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(pieces, k=2000)) for _ in range(2)] + ["ab" * 10_000, "a" * 8191 + "é" * 9000]
    assert min(map(len, texts)) > 2 * MAX_CHARACTERS
    cut = processing.tokenize(texts)
    monkeypatch.setattr(processing_module, "MAX_CHARACTERS", 10**9)
    assert same_tokens(processing.tokenize(texts), cut)
    monkeypatch.setattr(processing_module, "MAX_CHARACTERS", 20)  # the control: here the limit is met
    assert not same_tokens(processing.tokenize(texts), cut)


def test_a_tokenizer_learns_the_same_of_usual_texts_and_nothing_of_endless_words(monkeypatch):
    usual = [
        *TEXTS,
        "Ein Häschen läuft über 1234567890 Wiesen! " * 150,
        "一只狗在草地上奔跑" * 25,  # 225 letters without a space
        "สุนัขวิ่งบนสนามหญ้า" * 30,
        "x" * 256 + "-" * 256 + "7" * 256,
        "https://example.org/" + "a_b/" * 200,
    ]
    for canonical in (False, True):
        learned = build_tokenizer(usual, canonical=canonical).backend_tokenizer.to_str()
        endless = ["ab" * 2**17, "é" * 257, "7" * 2**17, "!?" * 2**17, "_" * 257]
        assert build_tokenizer([*usual, *endless], canonical=canonical).backend_tokenizer.to_str() == learned
        with monkeypatch.context() as context:
            context.setattr(processing_module, "MAX_CHARACTERS", 10**9)
            context.setattr(processing_module, "_LONG_RUN", re.compile("(?!)"))
            assert build_tokenizer(usual, canonical=canonical).backend_tokenizer.to_str() == learned
            some = [*usual, *(text[:300] for text in endless)]  # the control: what these would have taught
            assert build_tokenizer(some, canonical=canonical).backend_tokenizer.to_str() != learned


@pytest.mark.parametrize("kind", ["clip", "siglip", "slow"])
def test_texts_that_are_cut_are_counted(kind):
    _, processing = build_preset("tiny-clip" if kind == "slow" else f"tiny-{kind}", TEXTS)
    if kind == "slow":
        processing = replace(processing, tokenizer=ByT5Tokenizer(model_max_length=32), max_length=32)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["dog", "the", "é", "写真", "A.b,c!"], k=k % 40)) for k in range(2500)]
    texts += ["", "word " * 10_000, "!" * 20, "!" * 200]
    form = canonical_form if processing.canonical else str
    lengths = [len(processing.tokenizer(form(text), verbose=False)["input_ids"]) for text in texts]
    expected = sum(length > processing.max_length for length in lengths)
    assert 500 < expected < 2300 and lengths.count(processing.max_length) > 5  # those just fit
    assert processing.count_cut(texts) == expected
    assert processing.count_cut([]) == 0 and processing.count_cut(["dog", "word " * 10_000]) == 1


def test_counting_leaves_the_tokenizer_as_tokenizing_does():
    """Its settings of padding and length are saved with it."""
    _, processing = build_preset("tiny-clip", TEXTS)
    processing.tokenize(TEXTS)
    before = processing.tokenizer.backend_tokenizer.to_str()
    assert processing.count_cut(["word " * 200]) == 1
    assert processing.tokenizer.backend_tokenizer.to_str() == before


def test_clip_pads_to_the_longest_and_siglip_to_the_full_length():
    _, clip = build_preset("tiny-clip", TEXTS)
    _, siglip = build_preset("tiny-siglip", TEXTS)
    assert clip.tokenize(TEXTS)[0].shape[1] == max(len(clip.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert siglip.tokenize(TEXTS)[0].shape[1] == siglip.max_length


def test_only_siglip_texts_take_the_canonical_form():
    plain, spelled = ["a dog s photo 1"], ["  A dog's\tPHOTO: (1)!"]
    assert canonical_form(spelled[0]) == "a dogs photo 1"
    _, siglip = build_preset("tiny-siglip", TEXTS)
    _, clip = build_preset("tiny-clip", TEXTS)
    assert same_tokens(siglip.tokenize(spelled), siglip.tokenize(["a dogs photo 1"]))
    assert not torch.equal(clip.tokenize(spelled)[0], clip.tokenize(plain)[0])


def save_gemma(folder: Path, **settings: object) -> Path:
    """A fixed-resolution SigLIP 2 of letters: a Gemma tokenizer, which does not lower-case texts by itself."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters, *string.punctuation]
    vocabulary = {word: i for i, word in enumerate(words)}
    options = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", "model_max_length": 16}
    GemmaTokenizer(vocab=vocabulary, merges=[], model_input_names=["input_ids"], **options).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GemmaTokenizer"} | settings))
    text = {"vocab_size": len(words), "max_position_embeddings": 16}
    SiglipConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8}).save_pretrained(folder)
    return folder


def test_siglip_2_reads_lower_case_where_its_settings_say_so(tmp_path):
    """Its own tokenizer ignores do_lower_case; what we save does not, in plain transformers either."""
    mark = 6 + len(string.ascii_letters) + string.punctuation.index("!")
    expected = torch.tensor([[6, 5, 9, 20, 12, mark, 1, *[0] * 9]])  # a, space, d, o, g, !, end, padding
    processing = Processing.from_pretrained(save_gemma(tmp_path / "model", do_lower_case=True))
    assert processing.tokenize(["A Dog!"])[0].equal(expected) and not processing.canonical
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    processing.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["do_lower_case"] is True
    again = Processing.from_pretrained(tmp_path / "again")
    assert again.tokenize(["A Dog!"])[0].equal(expected) and settings(again) == settings(processing)
    plain = AutoProcessor.from_pretrained(tmp_path / "again").tokenizer
    assert plain(["A Dog!"], padding="max_length", return_tensors="pt")["input_ids"].equal(expected)
    other = Processing.from_pretrained(save_gemma(tmp_path / "other", do_lower_case=False))
    assert not other.tokenize(["A Dog!"])[0].equal(expected)  # the control


def test_clip_reads_as_many_tokens_as_it_has_positions(tmp_path):
    """Long-CLIP has 248, often with a tokenizer that says 77."""
    for said in (248, 77):
        tokenizer = build_tokenizer(TEXTS, max_length=said)
        text = {"vocab_size": len(tokenizer), "max_position_embeddings": 248, "eos_token_id": tokenizer.eos_token_id}
        CLIPConfig(text_config=text).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        processing = Processing.from_pretrained(tmp_path)
        assert processing.tokenize(["a dog runs " * 200])[0].shape == (1, 248) and processing.max_length == 248
        processing.save_pretrained(tmp_path / "export")
        assert AutoTokenizer.from_pretrained(tmp_path / "export").model_max_length == 248
    config = BertConfig(max_position_embeddings=512)
    form = DEFAULT_FORMS["two_towers"]
    assert make_processing(build_tokenizer(TEXTS, max_length=512), config, form, "two_towers").max_length == 128
    assert make_processing(build_tokenizer(TEXTS, max_length=77), config, form, "two_towers").max_length == 77


def test_processing_survives_save_and_load(saved):
    processing, folder = saved
    loaded = Processing.from_pretrained(folder)
    assert settings(loaded) == settings(processing)
    assert same_tokens(loaded.tokenize(TEXTS), processing.tokenize(TEXTS))


def test_the_bound_method_travels_to_worker_processes(saved):
    processing, _ = saved
    tokenize = pickle.loads(pickle.dumps(processing.tokenize))
    assert same_tokens(tokenize(TEXTS), processing.tokenize(TEXTS))


def test_auto_processor_tokenizes_as_training_does(saved):
    processing, folder = saved
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    texts = [*TEXTS, "Mixed CASE, with: punctuation!", "word " * 200]
    # The length is that of the saved files; users of a SigLIP ask for its padding themselves.
    tokens = tokenizer(texts, padding=processing.padding, truncation=True, return_tensors="pt")
    assert torch.equal(tokens["input_ids"], processing.tokenize(texts)[0])
    assert ("attention_mask" in tokens) == (processing.model_type == "clip")


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_the_way_of_resizing_is_kept_in_the_files(saved, resize, tmp_path):
    processing, folder = saved
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    processing = replace(processing, resize=Resize(resize), image_mean=(0.1, 0.2, 0.3))
    processing.save_pretrained(tmp_path)
    assert settings(Processing.from_pretrained(tmp_path)) == settings(processing)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_an_image_of_the_models_size_is_only_normalized(saved, resize):
    processing = replace(saved[0], resize=Resize(resize))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = processing.image_processor()(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    for channel in range(3):
        mean, std = processing.image_mean[channel], processing.image_std[channel]
        np.testing.assert_allclose(found[channel], (pixels[..., channel] / 255 - mean) / std, atol=1e-5)


def test_crop_squash_and_pad_show_what_their_names_say(saved):
    """A picture twice as wide as high, its left and right quarter red, the middle white."""
    picture = Image.new("RGB", (128, 64), "white")
    picture.paste("red", (0, 0, 32, 64))
    picture.paste("red", (96, 0, 128, 64))
    blue = {}
    for resize in ("crop", "squash", "pad"):
        processing = replace(saved[0], resize=Resize(resize), image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
        blue[resize] = processing.image_processor()(picture, return_tensors="pt")["pixel_values"][0, 2]
        assert blue[resize].shape == (32, 32)
    assert blue["crop"].min() > 0.9  # all white but for the edges of the resampling
    assert blue["squash"][:, :6].max() == 0 and blue["squash"][:, 12:20].min() == 1  # the whole width
    assert blue["pad"][:7].max() == 0 and blue["pad"][9:23, 12:20].min() == 1  # black above


def test_a_composed_pairs_files_load_by_themselves(tmp_path):
    config = BertConfig(hidden_size=8, num_attention_heads=2, max_position_embeddings=40)
    form = replace(DEFAULT_FORMS["two_towers"], size=48)
    processing = make_processing(build_tokenizer(TEXTS), config, form, "two_towers")
    processing.save_pretrained(tmp_path)
    assert processing.max_length == 40
    assert AutoImageProcessor.from_pretrained(tmp_path).crop_size["height"] == 48
    assert AutoTokenizer.from_pretrained(tmp_path, config=config)(TEXTS[0]) == processing.tokenizer(TEXTS[0])


def test_another_kind_of_model_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="--model .*'bert' is neither CLIP nor SigLIP.*--text-tower"):
        Processing.from_pretrained(tmp_path)


def test_openai_clip_texts_end_in_the_real_end_token(shared, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "weights" / "clip_tokenizer")
    CLIPConfig().save_pretrained(tmp_path)  # of OpenAI's vocabulary
    tokenizer.save_pretrained(tmp_path)
    processing = Processing.from_pretrained(tmp_path)
    input_ids, attention_mask = processing.tokenize(["A photo of a dog", "dog"])
    assert input_ids[0].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407]
    assert attention_mask.sum(1).tolist() == [7, 3]
    tokenize = pickle.loads(pickle.dumps(processing.tokenize))
    assert torch.equal(tokenize(["dog"])[0], processing.tokenize(["dog"])[0])
