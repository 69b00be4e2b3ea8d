"""The blocks of a trunk are those that its own code lists, first to last, for every supported kind."""

import pytest
import torchvision
from made_models import CLASSES, FAMILIES, save_family
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MobileNetV1Config,
    MobileNetV1Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from lib.towers.trainable import blocks

WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def names(trunk: nn.Module) -> list[str]:
    return [name for block in blocks(trunk) for name, module in trunk.named_modules() if module is block]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_halves_of_a_dual_encoder(family, tmp_path):
    model = CLASSES[family].from_pretrained(save_family(family, tmp_path))
    for half in (model.vision_model, model.text_model):
        found = names(half)
        assert len(found) == 2 and [name.rpartition(".")[2] for name in found] == ["0", "1"]
        assert all(".layer" in f".{name}" for name in found)


def test_encoders_of_transformers():
    bert = BertModel(BertConfig(vocab_size=50, **WIDTHS))
    assert blocks(bert) == list(bert.encoder.layer)
    distilled = DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32))
    assert blocks(distilled) == list(distilled.transformer.layer)
    assert len(blocks(ViTModel(ViTConfig(image_size=32, **WIDTHS)))) == 3
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]))
    assert blocks(resnet) == list(resnet.encoder.stages)
    mobilenet = MobileNetV1Model(MobileNetV1Config(depth_multiplier=0.25))
    assert blocks(mobilenet) == list(mobilenet.layer) and len(mobilenet.layer) == 26


def test_models_of_torchvision():
    assert names(torchvision.models.resnet18()) == ["layer1", "layer2", "layer3", "layer4"]
    assert names(torchvision.models.shufflenet_v2_x0_5()) == ["stage2", "stage3", "stage4"]
    assert names(torchvision.models.mobilenet_v3_small())[-1] == "features.12"
    assert names(torchvision.models.mnasnet0_5())[-1] == "layers.14"  # its norm and activation have no place of theirs


def test_models_of_timm():
    timm = pytest.importorskip("timm")
    assert names(timm.create_model("resnet10t")) == ["layer1", "layer2", "layer3", "layer4"]
    assert len(blocks(timm.create_model("vit_tiny_patch16_224"))) == 12
    assert names(timm.create_model("convnext_atto"))[-1] == "stages.3"
    assert names(timm.create_model("regnety_002")) == ["s1", "s2", "s3", "s4"]


def test_an_unknown_kind_has_none():
    assert blocks(nn.Sequential(nn.Linear(2, 2))) == []
