"""Which towers a run trains: a preset, a dual encoder (CLIP, SigLIP, ...), an earlier run's, or two encoders."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from lib.data.pipeline import ResizeFlag
from lib.errors import InputError
from lib.towers.composed import new_pair
from lib.towers.encoders import find_half, split_half
from lib.towers.heads import Head, HeadKind
from lib.towers.model_files import find_model, reading
from lib.towers.presets import PRESETS, SIZES, START_SCALE, Family, build_preset
from lib.towers.processing import Processing, make_processing
from lib.towers.saved import load_parts
from lib.towers.text_form import load_tokenizer
from lib.towers.two_towers import TwoTowers


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
    projection_dropout: float = 0.0,
    image_size: int | None = None,
    resize: ResizeFlag = "auto",
    texts: Callable[[], list[str]] | None = None,
    use_bias: bool | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[TwoTowers, Processing]:
    """Build or load the towers and what they want of their inputs; the module is in eval mode.

    family: decides between the presets that "tiny" or "small" stand for, and on the scale that a fresh model
        starts at.
    model: a preset, or folder or hub id of a CLIP, SigLIP, SigLIP 2, ChineseCLIP or AltCLIP model, of a CLIP or SigLIP
        of open_clip, or of one written by this program.
    image_tower, text_tower: instead of a model, two encoders as `lib.towers.composed.new_pair` takes them;
        `projection*` shape their heads (see `lib.towers.heads.Head`), `text_projection` that of the text tower.
    image_size: another side of the images than the model's own.
    resize: auto refuses a model whose own image processor does what our pipeline cannot do.
    texts: gives texts of the training data; called only where a tokenizer has to be built.
    use_bias: whether logit_bias trains; by default in the SigLIP family. A model's own bias is its start.
    dropout: of the attention weights of a preset; other models come with their own.
    """
    use_bias = family == "siglip" if use_bias is None else use_bias
    name = f"{model}-{family}" if model in SIZES else model
    if dropout and name not in PRESETS:
        raise InputError(f"--dropout {dropout} is for the presets {', '.join(SIZES)}; other models have their own")
    if image_tower or text_tower:
        image_tower, text_tower = _checked_pair(model, image_tower, text_tower)
        _check_text_projection(text_tower, text_projection)
        image_head = Head(projection, projection_dim, projection_hidden, projection_dropout)
        text_head = image_head if text_projection == "same" else replace(image_head, kind=text_projection)
        heads = image_head, text_head
        return _compose(image_tower, text_tower, heads, image_size, resize, START_SCALE[family], use_bias, seed)
    if model is None:
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
    return _load(model, image_size, resize, use_bias)


def _checked_pair(model: str | None, image_tower: str | None, text_tower: str | None) -> tuple[str, str]:
    if model is not None:
        raise InputError(f"--model {model} excludes --image-tower and --text-tower: leave it out, or them")
    if image_tower and text_tower:
        return image_tower, text_tower
    missing = "--text-tower" if image_tower else "--image-tower"
    raise InputError(f"{missing} is missing: a composed model needs both --image-tower and --text-tower")


def _check_text_projection(text_tower: str, text_projection: str) -> None:
    folder_or_id, half = split_half(text_tower)
    if half and text_projection not in ("same", "none"):
        raise InputError(
            f"--text-projection {text_projection}: --text-tower {text_tower} has its own; leave the flag out, or use "
            f"--text-tower {folder_or_id} for its encoder with a fresh head"
        )


def _compose(
    image_tower: str,
    text_tower: str,
    heads: tuple[Head, Head],
    image_size: int | None,
    resize: ResizeFlag,
    scale: float,
    use_bias: bool,
    seed: int,
) -> tuple[TwoTowers, Processing]:
    bias = 0.0 if use_bias else None
    parts = new_pair(
        image_tower, text_tower, *heads, image_size=image_size, resize=resize, scale=scale, bias=bias, seed=seed
    )
    text_config = parts.text.trunk.config
    with reading("--text-tower", text_tower):
        tokenizer = load_tokenizer(find_half("--text-tower", text_tower, weights=False)[0], text_config)
    processing = make_processing(tokenizer, text_config, parts.image_form, "two_towers")
    return TwoTowers(parts), processing


def _load(name: str, image_size: int | None, resize: ResizeFlag, use_bias: bool) -> tuple[TwoTowers, Processing]:
    model = find_model("--model", name)
    parts = load_parts(model, image_size, resize)
    bias = (parts.bias or 0.0) if use_bias else None
    parts = replace(parts, bias=bias, pretrained_bias=parts.pretrained_bias and use_bias)
    processing = Processing.from_pretrained(model, resize)
    form = processing.image_form.at(parts.image_form.size)
    return TwoTowers(parts), replace(processing, image_size=form.size, resize=form.resize)
