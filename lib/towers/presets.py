"""Models from a configuration: nothing is downloaded, weights are drawn, the tokenizer is built."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from lib.towers.dual import check_image_size, dual_parts
from lib.towers.image_form import DEFAULT_FORMS
from lib.towers.model_files import quiet
from lib.towers.processing import Processing, build_tokenizer, make_processing
from lib.towers.two_towers import TwoTowers

Family = Literal["clip", "siglip"]

# Multiplier of the logits at the start: Radford et al. 2021, section 2.5; Zhai et al. 2023, algorithm 1.
START_SCALE: dict[Family, float] = {"clip": 1 / 0.07, "siglip": 10.0}


@dataclass(frozen=True)
class Size:
    """Widths and depths of a preset; image and text encoder are alike. text_length: most tokens of a CLIP's text."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    text_length: int
    vocab_size: int


SIZES = {
    "tiny": Size(32, patch_size=8, width=64, layers=2, heads=4, text_length=32, vocab_size=1000),
    "small": Size(224, patch_size=16, width=384, layers=12, heads=6, text_length=64, vocab_size=16384),
}
SIGLIP_TEXT_LENGTH = 64
"""Tokens that transformers' pipelines pad the texts of every SigLIP to, as those of Google have positions for."""
PRESETS = tuple(f"{size}-{family}" for size in SIZES for family in START_SCALE)


def build_preset(
    name: str,
    texts: list[str],
    *,
    image_size: int | None = None,
    scale: float | None = None,
    use_bias: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[TwoTowers, Processing]:
    """Build one of `PRESETS`, with a tokenizer trained on the texts.

    image_size: another side than the preset's, a multiple of its patch size.
    scale: start of the logits' multiplier; the default is that of the preset's family.
    dropout: of the attention weights, in both towers.
    """
    size_name, _, family_name = name.partition("-")
    family: Family = "clip" if family_name == "clip" else "siglip"
    size = SIZES[size_name]
    length = size.text_length if family == "clip" else SIGLIP_TEXT_LENGTH
    size = replace(size, image_size=image_size or size.image_size, text_length=length)
    check_image_size(size.image_size, size.patch_size)
    tokenizer = build_tokenizer(texts, size.vocab_size, size.text_length, canonical=family == "siglip")
    form = replace(DEFAULT_FORMS[family], size=size.image_size)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (_clip if family == "clip" else _siglip)(size, tokenizer, dropout)
    bias = 0.0 if use_bias else None
    towers = TwoTowers(dual_parts(model, form, bias))
    towers.set_scale_and_bias(scale or START_SCALE[family], None)
    return towers, make_processing(tokenizer, model.config.text_config, form, family)


def _clip(size: Size, tokenizer: PreTrainedTokenizerBase, dropout: float) -> CLIPModel:
    text, vision = _encoder_settings(size, tokenizer, dropout)
    return CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(**text).to_dict(),
            vision_config=CLIPVisionConfig(**vision).to_dict(),
            projection_dim=size.width,
        )
    )


def _siglip(size: Size, tokenizer: PreTrainedTokenizerBase, dropout: float) -> SiglipModel:
    text, vision = _encoder_settings(size, tokenizer, dropout)
    return SiglipModel(
        SiglipConfig(
            text_config=SiglipTextConfig(**text).to_dict(),
            vision_config=SiglipVisionConfig(**vision).to_dict(),
        )
    )


def _encoder_settings(size: Size, tokenizer: PreTrainedTokenizerBase, dropout: float) -> tuple[dict, dict]:
    """The settings of the text and the image encoder, alike for CLIP and SigLIP."""
    both = {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "attention_dropout": dropout,
    }
    text = both | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": size.text_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return text, both | {"image_size": size.image_size, "patch_size": size.patch_size}
