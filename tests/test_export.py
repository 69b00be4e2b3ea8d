"""An exported folder gives the same logits in transformers alone, or it does not exist."""

from dataclasses import replace

import pytest
import torch
from made_exports import COMPOSED, OF_TRANSFORMERS, logits_of, made_towers, picture, run_example
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoModel, AutoProcessor, pipeline

from lib.data.pipeline import Resize
from lib.errors import InputError, RunError
from lib.export import export, noise_and_texts
from lib.export.card import model_card
from lib.export.hugging_face import HUGGING_FACE
from lib.towers import TwoTowers, build_preset
from lib.towers.processing import Processing

TEXTS = ["a photo of the digit zero", "one", "a dog, running over the grass"]


@pytest.fixture(params=[*OF_TRANSFORMERS, COMPOSED])
def trained(request, tmp_path_factory):
    """Towers of each kind after a step away from their start."""
    return made_towers(request.param, tmp_path_factory.mktemp("start"))


@pytest.fixture
def clip(tmp_path_factory):
    return made_towers("clip", tmp_path_factory.mktemp("start"))


def logits(towers: TwoTowers, pixels: torch.Tensor, processing: Processing) -> torch.Tensor:
    output = towers(pixels, *processing.tokenize(TEXTS))
    return output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias


def noise(count: int = 3) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_the_export_gives_the_same_logits_and_leaves_only_itself(trained, tmp_path):
    towers, processing = trained
    towers.train()
    assert export(towers, processing, tmp_path / "export", noise_and_texts(processing)) <= 1e-5
    assert towers.training
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    loaded = TwoTowers.from_pretrained(tmp_path / "export")
    again = logits(loaded, noise(), Processing.from_pretrained(tmp_path / "export"))
    torch.testing.assert_close(again, logits(towers.eval(), noise(), processing), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", ["clip with bias", "siglip"], indirect=True)
def test_transformers_alone_gets_the_same_logits_from_pictures_and_texts(trained, tmp_path):
    towers, processing = trained
    export(towers, processing, tmp_path / "export", noise_and_texts(processing))
    processor = AutoProcessor.from_pretrained(tmp_path / "export")
    pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in noise()]
    inputs = processor(text=TEXTS, images=pictures, padding=processing.padding, truncation=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], processing.tokenize(TEXTS)[0])
    found = AutoModel.from_pretrained(tmp_path / "export")(**inputs).logits_per_image
    bias = 0 if processing.model_type.startswith("siglip") else towers.logit_bias  # the others' models add none
    torch.testing.assert_close(found + bias, logits(towers, noise(), processing), rtol=0, atol=1e-5)


def test_the_example_of_the_card_runs_and_is_true(trained, tmp_path, monkeypatch):
    towers, processing = trained
    card = model_card(tmp_path / "no run", None, towers, processing, HUGGING_FACE, "export")
    export(towers, processing, tmp_path / "export", noise_and_texts(processing), card=card)
    expected = logits_of(towers, processing, picture(tmp_path))
    found = run_example((tmp_path / "export" / "README.md").read_text(), tmp_path, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_tiny_siglip_works_in_the_pipeline_that_its_card_names(tmp_path):
    """transformers' pipeline pads the texts of every SigLIP to 64 tokens: as many as the preset has positions for."""
    towers, processing = build_preset("tiny-siglip", TEXTS, use_bias=True, scale=10.0)
    card = model_card(tmp_path / "no run", None, towers, processing, HUGGING_FACE, "export")
    export(towers, processing, tmp_path / "export", noise_and_texts(processing), card=card)
    assert "pipeline_tag: zero-shot-image-classification" in card
    labels = ["one", "a photo of the digit zero"]
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "export"), device="cpu")
    found = classify(picture(tmp_path), candidate_labels=labels, hypothesis_template="{}")
    with torch.no_grad():
        output = towers(pil_to_tensor(picture(tmp_path))[None], *processing.tokenize(labels))
    expected = (output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias).sigmoid()[0]
    scores = {each["label"]: each["score"] for each in found}
    assert scores == pytest.approx(dict(zip(labels, expected.tolist(), strict=True)))
    assert processing.max_length == build_preset("small-siglip", TEXTS)[1].max_length == 64


def test_an_export_replaces_an_older_one_whole(clip, tmp_path):
    towers, processing = clip
    export(towers, processing, tmp_path / "export", noise_and_texts(processing))
    (tmp_path / "export" / "left over").write_text("")
    towers.set_scale_and_bias(12.0, None)
    export(towers, processing, tmp_path / "export", noise_and_texts(processing))
    assert not (tmp_path / "export" / "left over").exists()
    assert TwoTowers.from_pretrained(tmp_path / "export")().logit_scale.item() == pytest.approx(12.0)


def test_files_that_say_something_else_are_no_export(clip, tmp_path):
    """Negative control: a wrong normalization in the files is found, and the older export stays."""
    towers, processing = clip
    export(towers, processing, tmp_path / "export", noise_and_texts(processing))
    before = (tmp_path / "export" / "processor_config.json").read_text()
    wrong = replace(processing, image_mean=(0.5, 0.5, 0.5))
    with pytest.raises(RunError, match=r"differs from the model by .* in a logit, more than 0\.0001"):
        export(towers, wrong, tmp_path / "export", noise_and_texts(processing))
    assert (tmp_path / "export" / "processor_config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("trained", ["clip", "siglip2", COMPOSED], indirect=True)
def test_an_image_processor_that_gives_other_pixels_is_no_export(trained, tmp_path):
    """Negative control: the logits of the sample, which has the model's size already, do not show it."""
    towers, processing = trained
    other = "bilinear" if processing.resize.interpolation == "bicubic" else "bicubic"

    def write(towers, processing, folder):
        resize = replace(processing.resize, interpolation=other)
        HUGGING_FACE.write(towers, replace(processing, resize=resize), folder)

    form = replace(HUGGING_FACE, write=write)
    with pytest.raises(RunError, match=r"image processor of the export .* differ by [1-9]\.\d of 255 levels"):
        export(towers, processing, tmp_path / "export", noise_and_texts(processing), form=form)
    assert not list(tmp_path.iterdir())


def test_the_models_own_preparation_is_that_of_the_export(clip, tmp_path):
    towers, processing = clip
    processing = replace(processing, resize=Resize("crop", 36, "bilinear"))
    export(towers, processing, tmp_path / "export", noise_and_texts(processing))
    processor = AutoProcessor.from_pretrained(tmp_path / "export").image_processor
    image = Image.effect_noise((90, 60), 50).convert("RGB").resize((900, 600))
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(theirs, processing.image_form.normalized(image), rtol=0, atol=1e-5)
    assert (theirs - replace(processing, resize=Resize("crop")).image_form.normalized(image)).abs().mean() > 0.05
    assert Processing.from_pretrained(tmp_path / "export").resize == processing.resize


@pytest.mark.parametrize("change", [1e-3, 0.0])
def test_a_weight_that_differs_in_the_file_is_no_export(clip, change, tmp_path):
    """Negative control: one matrix of the written file is another; unchanged, the same detour is an export."""

    def write(towers, processing, folder):
        HUGGING_FACE.write(towers, processing, folder)
        weights = load_file(folder / "model.safetensors")
        weights["text_projection.weight"][0, 0] += change * 100
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    towers, processing = clip
    form, target = replace(HUGGING_FACE, write=write), tmp_path / "export"
    if not change:
        assert export(towers, processing, target, noise_and_texts(processing), form=form) <= 1e-5
        return
    with pytest.raises(RunError, match="differs from the model by"):
        export(towers, processing, target, noise_and_texts(processing), form=form)
    assert not list(tmp_path.iterdir())


def test_a_model_with_a_broken_number_is_no_export(clip, tmp_path):
    towers, processing = clip
    with torch.no_grad():
        towers.logit_scale.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="nan"):
        export(towers, processing, tmp_path / "export", noise_and_texts(processing))
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_told_and_kept(clip, tmp_path):
    towers, processing = clip
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(OSError):
        export(towers, processing, tmp_path / "runs" / "export", noise_and_texts(processing))
    assert (tmp_path / "runs").read_text() == "mine"


def test_a_form_that_is_not_for_the_model_leaves_nothing(clip, tmp_path):
    def refuse(towers):
        raise InputError("--format: no")

    towers, processing = clip
    with pytest.raises(InputError, match="no"):
        export(
            towers,
            processing,
            tmp_path / "export",
            noise_and_texts(processing),
            form=replace(HUGGING_FACE, check=refuse),
        )
    assert not list(tmp_path.iterdir())
