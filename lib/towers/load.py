"""Ways to the towers of a run: a preset, a dual encoder (CLIP, SigLIP, ...), an earlier run's, or two encoders."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, PreTrainedTokenizerBase, SiglipConfig, SiglipModel

from lib.data.pipeline import ResizeFlag
from lib.errors import InputError
from lib.towers.composed import new_pair
from lib.towers.dual import check_image_size, dual_parts
from lib.towers.encoders import split_half
from lib.towers.image_form import DEFAULT_FORMS
from lib.towers.model_files import find_model, quiet
from lib.towers.processing import Processing, build_tokenizer, make_processing
from lib.towers.tower import Head, HeadKind
from lib.towers.two_towers import TwoTowers, load_parts

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
"""transformers' pipelines pad the texts of every SigLIP to as many tokens as Google's have positions for."""
PRESETS = tuple(f"{size}-{family}" for size in SIZES for family in START_SCALE)


def load_towers(
    *,
    family: Family,
    model: str | None = None,
    image_tower: str | None = None,
    text_tower: str | None = None,
    projection: HeadKind = "linear",
    text_projection: HeadKind | Literal["same"] = "same",
    projection_dim: int = 512,
    projection_hidden: int | None = None,
    image_size: int | None = None,
    resize: ResizeFlag = "auto",
    texts: Callable[[], list[str]] | None = None,
    use_bias: bool | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[TwoTowers, Processing]:
    """Build or load the towers and the processing of their inputs; the module is in eval mode.

    family: decides between the presets that "tiny" or "small" stand for, and on the scale that a fresh model
        starts at.
    model: a preset, or folder or hub id of a CLIP, SigLIP, SigLIP 2, ChineseCLIP or AltCLIP model, of a CLIP or SigLIP
        of open_clip, or of one written by this program.
    image_tower, text_tower: instead of a model, two encoders as `lib.towers.composed.new_pair` takes them;
        `projection*` shape their heads (see `lib.towers.tower.Head`), `text_projection` that of the text tower.
    image_size: another side of the images than the model's own.
    resize: auto refuses a model whose own image processor does what our pipeline cannot do.
    texts: returns texts of the training data; called only where a tokenizer has to be built.
    use_bias: logit_bias trains; by default in the SigLIP family. A model's own bias is its start.
    dropout: of the attention weights of a preset, or in mlp heads; other models come with their own.
    """
    use_bias = family == "siglip" if use_bias is None else use_bias
    name = f"{model}-{family}" if model in SIZES else model
    mlp = bool(image_tower) and "mlp" in (projection, text_projection)
    if dropout and name not in PRESETS and not mlp:
        raise InputError(
            f"--dropout {dropout} is for the presets {', '.join(SIZES)}, for mlp heads and for --lora; other models "
            "have their own"
        )
    if image_tower or text_tower:
        image_tower, text_tower = _checked_pair(model, image_tower, text_tower, text_projection)
        image_head = Head(projection, projection_dim, projection_hidden, dropout)
        parts, processing = new_pair(
            image_tower,
            text_tower,
            image_head,
            image_head if text_projection == "same" else replace(image_head, kind=text_projection),
            image_size=image_size,
            resize=resize,
            scale=START_SCALE[family],
            bias=0.0 if use_bias else None,
            seed=seed,
        )
        return TwoTowers(parts), processing
    if name is None:
        raise InputError(f"--model is missing: give a folder, a hub id or one of {', '.join(SIZES)}")
    if name in PRESETS:
        return build_preset(
            name,
            texts() if texts else [],
            image_size=image_size,
            scale=START_SCALE[family],
            use_bias=use_bias,
            dropout=dropout,
            seed=seed,
        )
    return _load(name, image_size, resize, use_bias)


def _checked_pair(
    model: str | None, image_tower: str | None, text_tower: str | None, text_projection: str
) -> tuple[str, str]:
    if model is not None:
        raise InputError(f"--model {model} excludes --image-tower and --text-tower: leave it out, or them")
    if not (image_tower and text_tower):
        missing = "--text-tower" if image_tower else "--image-tower"
        raise InputError(f"{missing} is missing: a composed model needs both --image-tower and --text-tower")
    folder_or_id, half = split_half(text_tower)
    if half and text_projection not in ("same", "none"):
        raise InputError(
            f"--text-projection {text_projection}: --text-tower {text_tower} has its own; leave the flag out, or use "
            f"--text-tower {folder_or_id} for its encoder with a fresh head"
        )
    return image_tower, text_tower


def _load(name: str, image_size: int | None, resize: ResizeFlag, use_bias: bool) -> tuple[TwoTowers, Processing]:
    model = find_model("--model", name)
    parts = load_parts(model, image_size, resize)
    processing = Processing.from_pretrained(model, resize, measured=parts.image_form)
    bias = (parts.bias or 0.0) if use_bias else None
    parts = replace(parts, bias=bias, pretrained_bias=parts.pretrained_bias and use_bias)
    form = processing.image_form.at(parts.image_form.size)
    return TwoTowers(parts), replace(processing, image_size=form.size, resize=form.resize)


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
    """Build one of `PRESETS` from its configuration, with random weights and a tokenizer trained on the texts.

    image_size: another side than the preset's, a multiple of its patch size.
    scale: start of the logits' multiplier; the default is that of the preset's family.
    dropout: of the attention weights, in both towers.
    """
    size_name, _, family_name = name.partition("-")
    family: Family = "clip" if family_name == "clip" else "siglip"
    size = SIZES[size_name]
    size = replace(size, image_size=image_size or size.image_size)
    text_length = size.text_length if family == "clip" else SIGLIP_TEXT_LENGTH
    check_image_size(size.image_size, size.patch_size)
    tokenizer = build_tokenizer(texts, size.vocab_size, text_length, canonical=family == "siglip")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _dual_encoder(family, size, tokenizer, text_length, dropout)
    form = replace(DEFAULT_FORMS[family], size=size.image_size)
    towers = TwoTowers(dual_parts(model, form, 0.0 if use_bias else None))
    towers.set_scale_and_bias(scale or START_SCALE[family], None)
    return towers, make_processing(tokenizer, model.config.text_config, form, family)


def _dual_encoder(
    family: Family, size: Size, tokenizer: PreTrainedTokenizerBase, text_length: int, dropout: float
) -> PreTrainedModel:
    both = {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "attention_dropout": dropout,
    }
    text = both | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": text_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = both | {"image_size": size.image_size, "patch_size": size.patch_size}
    if family == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size.width))
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
