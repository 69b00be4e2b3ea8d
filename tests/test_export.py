"""An exported folder gives the same logits through transformers alone, or it is not there at all."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, ResNetConfig, ResNetModel

from lib.export import export
from lib.processing import Processing, build_tokenizer
from lib.towers import TwoTowers, load_towers

TEXTS = ["A photo of the digit zero!", "the digit one", "a dog, running over the grass"]


@dataclass
class Pairs:
    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    tokenizer = build_tokenizer(TEXTS)
    image, text = root / "resnet", root / "bert"
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(image)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(text)
    tokenizer.save_pretrained(text)
    return {"image_tower": str(image), "text_tower": str(text), "image_size": 32, "projection": "mlp"}


DUALS = ["clip", "siglip", "clip with bias", "siglip without bias"]


@pytest.fixture(params=[*DUALS, "composed"])
def trained(request, composed):
    """Towers of each kind after a step away from their start."""
    options = {
        "clip": {"model": "tiny-clip", "family": "clip"},
        "siglip": {"model": "tiny-siglip", "family": "siglip"},
        "clip with bias": {"model": "tiny-clip", "family": "siglip"},
        "siglip without bias": {"model": "tiny-siglip", "family": "clip"},
        "composed": {**composed, "family": "siglip"},
    }
    towers, processing = load_towers(texts=lambda: TEXTS, **options[request.param])
    towers.set_scale_and_bias(25.0, -6.0 if towers.use_bias else None)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.mul_(1.01)
    return towers, processing


def sample(processing: Processing) -> Pairs:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    return Pairs(torch.from_numpy(pixels), *processing.tokenize(TEXTS))


def logits(towers: TwoTowers, pairs: Pairs) -> Tensor:
    output = towers(pairs.pixel_values, pairs.input_ids, pairs.attention_mask)
    return output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias


def test_the_export_gives_the_same_logits_and_leaves_only_itself(trained, tmp_path):
    towers, processing = trained
    pairs = sample(processing)
    towers.train()
    assert export(towers, processing, tmp_path / "export", pairs) <= 1e-5
    assert towers.training
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    loaded = TwoTowers.from_pretrained(tmp_path / "export")
    tokens = Processing.from_pretrained(tmp_path / "export").tokenize(TEXTS)
    again = logits(loaded, Pairs(pairs.pixel_values, *tokens))
    torch.testing.assert_close(again, logits(towers.eval(), pairs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", DUALS, indirect=True)
def test_transformers_alone_gets_the_same_logits_from_pictures_and_texts(trained, tmp_path):
    towers, processing = trained
    pairs = sample(processing)
    export(towers, processing, tmp_path / "export", pairs)
    processor = AutoProcessor.from_pretrained(tmp_path / "export")
    pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in pairs.pixel_values]
    inputs = processor(text=TEXTS, images=pictures, padding=processing.padding, truncation=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], pairs.input_ids)
    found = AutoModel.from_pretrained(tmp_path / "export")(**inputs).logits_per_image
    bias = towers.logit_bias if processing.model_type == "clip" else 0  # CLIPModel itself adds none
    torch.testing.assert_close(found + bias, logits(towers, pairs), rtol=0, atol=1e-5)


def test_an_export_replaces_an_older_one_whole(trained, tmp_path):
    towers, processing = trained
    export(towers, processing, tmp_path / "export", sample(processing))
    (tmp_path / "export" / "left over").write_text("")
    towers.set_scale_and_bias(12.0, None)
    export(towers, processing, tmp_path / "export", sample(processing))
    assert not (tmp_path / "export" / "left over").exists()
    assert TwoTowers.from_pretrained(tmp_path / "export")().logit_scale.item() == pytest.approx(12.0)


def test_files_that_say_something_else_are_no_export(tmp_path):
    """Negative control: a wrong normalization in the files is found, and the older export stays."""
    towers, processing = load_towers(model="tiny", family="clip", texts=lambda: TEXTS)
    export(towers, processing, tmp_path / "export", sample(processing))
    before = (tmp_path / "export" / "processor_config.json").read_text()
    wrong = replace(processing, image_mean=(0.5, 0.5, 0.5))
    with pytest.raises(RuntimeError, match="differs from the model by"):
        export(towers, wrong, tmp_path / "export", sample(processing))
    assert (tmp_path / "export" / "processor_config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_model_with_a_broken_number_is_no_export(tmp_path):
    towers, processing = load_towers(model="tiny", family="clip", texts=lambda: TEXTS)
    with torch.no_grad():
        towers.logit_scale.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="nan"):
        export(towers, processing, tmp_path / "export", sample(processing))
    assert not list(tmp_path.iterdir())
