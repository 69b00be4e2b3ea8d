"""Folders of open_clip: open_clip_config.json as settings of transformers' CLIP or SigLIP, and the tokenizer."""

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, CLIPTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lib.data.pipeline import MODES, Resize, Way
from lib.errors import InputError, raised_as
from lib.towers.image_form import DEFAULT_FORMS, ImageForm
from lib.towers.model_files import CONFIG, NO_CODE, OPEN_CLIP_CONFIG, ModelFolder, find_model

_RESIZE: dict[str, Way] = {"shortest": "crop", "squash": "squash", "longest": "pad"}
_SPACES = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
_PUNCTUATION = normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")
# What open_clip does to texts before the tokenizer, where that is more than to collapse white space.
_CLEAN: dict[str, list[normalizers.Normalizer]] = {
    "whitespace": [],
    "lower": [normalizers.Lowercase()],
    "canonicalize": [normalizers.Replace("_", " "), _PUNCTUATION, normalizers.Lowercase(), *_SPACES],
}


def _any_value(names: str) -> dict[str, tuple]:
    return dict.fromkeys(names.split(), ())


# Settings that are read, with the values that transformers' models can express where that is not any value. A setting
# that is not here may be off, but not on: it would make another model of the same weights.
_READ = {
    "model_cfg": _any_value(
        "embed_dim vision_cfg text_cfg quick_gelu custom_text init_logit_scale init_logit_bias nonscalar_logit_scale"
    ),
    "vision_cfg": _any_value(
        "width head_width layers mlp_ratio patch_size image_size norm_kwargs act_kwargs patch_dropout output_tokens "
        "attn_pooler_queries attn_pooler_heads"
    )
    | {"pool_type": ("tok",), "pos_embed_type": ("learnable",), "block_type": ("default",)},
    "text_cfg": _any_value(
        "context_length vocab_size width heads layers mlp_ratio norm_kwargs act_kwargs pad_id eos_id output_tokens "
        "hf_tokenizer_name tokenizer_kwargs"
    )
    | {"pool_type": ("argmax", "eos"), "proj_type": ("linear",), "block_type": ("default",)},
}
_READ_OF_SIGLIP = {
    "model_cfg": _READ["model_cfg"],
    "vision_cfg": _any_value("timm_model_name image_size timm_model_pretrained timm_drop_path")
    | {"timm_pool": ("map",), "timm_proj": ("none", "")},
    "text_cfg": _READ["text_cfg"] | {"pool_type": ("last",), "no_causal_mask": (True,), "proj_bias": (True,)},
}
_NEEDED_BY_SIGLIP = {"vision_cfg": ("timm_pool",), "text_cfg": ("pool_type", "no_causal_mask", "proj_bias")}


def open_clip_settings(model: ModelFolder) -> dict:
    """The config.json that transformers' CLIP or SigLIP of these weights would have, with the image form.

    InputError names a setting of open_clip_config.json that transformers' models cannot express.
    """
    content = _content(model)
    settings = content["model_cfg"]
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    siglip = "timm_model_name" in vision
    _check_read(model, settings, _READ_OF_SIGLIP if siglip else _READ, _NEEDED_BY_SIGLIP if siglip else {})
    quick = settings.get("quick_gelu", False)
    text_config = _text_config(model, text, quick)
    if siglip:
        vision_config = _timm_config(model, vision)
        text_config |= {"projection_size": settings["embed_dim"]}
        found = {"model_type": "siglip", "architectures": ["SiglipModel"]}
    else:
        vision_config = _vision_config(model, vision, quick)
        # transformers takes end token 2 as the mark of old files, and pools at the highest token as open_clip does.
        text_config |= {"eos_token_id": text.get("eos_id", 2) if text.get("pool_type") == "eos" else 2}
        found = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": settings["embed_dim"]}
    form = _image_form(model, content.get("preprocess_cfg", {}), vision_config["image_size"])
    return found | {"text_config": text_config, "vision_config": vision_config, "image_form": asdict(form)}


def open_clip_tokenizer(
    model: ModelFolder, text_config: PretrainedConfig
) -> tuple[PreTrainedTokenizerBase, list[normalizers.Normalizer]]:
    """The tokenizer in the folder, else the hub's that the settings name, else CLIP's own out of open_clip's package.

    Returns it with the steps that open_clip applies to texts before it.
    """
    text = _content(model)["model_cfg"]["text_cfg"]
    name, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    clean = options.get("clean", "whitespace")
    if clean not in _CLEAN or any(value for key, value in options.items() if key != "clean"):
        raise model.fault(f"{OPEN_CLIP_CONFIG} has tokenizer_kwargs {options}, of which only clean is read here")
    if any((model.path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        tokenizer = AutoTokenizer.from_pretrained(model.path, config=text_config, **NO_CODE)
    elif name:
        other = find_model(model.flag, name, weights=False)
        tokenizer = AutoTokenizer.from_pretrained(other.path, **NO_CODE)
    else:
        tokenizer = _clip_tokenizer(model)
    return tokenizer, _CLEAN[clean]


def _content(model: ModelFolder) -> dict:
    return json.loads((model.path / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))


def _check_read(model: ModelFolder, settings: dict, read: dict, needed: dict) -> None:
    """InputError for the first setting that would make another model than transformers' of these sizes."""
    parts = {"model_cfg": settings, "vision_cfg": settings["vision_cfg"], "text_cfg": settings["text_cfg"]}
    for part, known in read.items():
        given = {key: value for key, value in parts[part].items() if value not in (None, False)}
        faults = [key for key, value in given.items() if known.get(key, (None,)) and value not in known.get(key, ())]
        faults += [key for key in needed.get(part, ()) if key not in given]
        faults += ["layers"] if isinstance(given.get("layers"), list) else []  # of a ResNet
        for key in faults[:1]:
            raise model.fault(
                f"{OPEN_CLIP_CONFIG} has {part}.{key} = {parts[part].get(key)!r}; of open_clip's models only CLIP and "
                "SigLIP with vision transformers are read here: use another checkpoint, or its transformers version"
            )


def _text_config(model: ModelFolder, text: dict, quick_gelu: bool) -> dict:
    sizes = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12} | text
    return _encoder_config(model, sizes, quick_gelu) | {
        "num_attention_heads": sizes["heads"],
        "max_position_embeddings": sizes["context_length"],
        "vocab_size": sizes["vocab_size"],
    }


def _vision_config(model: ModelFolder, vision: dict, quick_gelu: bool) -> dict:
    sizes = {"layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "image_size": 224} | vision
    return _encoder_config(model, sizes, quick_gelu) | {
        "num_attention_heads": sizes["width"] // sizes["head_width"],
        "patch_size": _side(model, sizes["patch_size"]),
        "image_size": _side(model, sizes["image_size"]),
    }


def _encoder_config(model: ModelFolder, part: dict, quick_gelu: bool) -> dict:
    return {
        "hidden_size": part["width"],
        "num_hidden_layers": part["layers"],
        "intermediate_size": int(part["width"] * part.get("mlp_ratio", 4.0)),
        "hidden_act": _activation(model, part.get("act_kwargs") or {}, quick_gelu),
        "layer_norm_eps": (part.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _activation(model: ModelFolder, options: dict, quick_gelu: bool) -> str:
    if options not in ({}, {"approximate": "tanh"}) or (options and quick_gelu):
        raise model.fault(f"{OPEN_CLIP_CONFIG}: an activation of act_kwargs {options} is of no kind that is read here")
    if quick_gelu:
        return "quick_gelu"
    return "gelu_pytorch_tanh" if options else "gelu"


def _timm_config(model: ModelFolder, vision: dict) -> dict:
    """The sizes of SigLIP's image encoder, of which open_clip's settings give nothing but timm's name."""
    name = vision["timm_model_name"]
    with raised_as(lambda _: model.fault(f"its image tower {name} is timm's: pip install timm"), ImportError):
        import timm
        from timm.layers import AttentionPoolLatent
        from timm.models import VisionTransformer
    # A shape without a name lies beside the weights, in timm's own form; the settings say where that was written.
    own = name.startswith(("local-dir:", "hf-hub:")) and (model.path / CONFIG).is_file()
    # Structure alone: no memory, no weights.
    with torch.device("meta"), raised_as(lambda fault: _unknown_to_timm(model, name, fault), RuntimeError):
        trunk = timm.create_model(f"local-dir:{model.path}" if own else name, num_classes=0, global_pool="map")
    if not isinstance(trunk, VisionTransformer) or not isinstance(trunk.attn_pool, AttentionPoolLatent):
        raise model.fault(
            f"its image tower {name} is no vision transformer of SigLIP, the only one of timm's read here"
        )
    block = trunk.blocks[0]
    tanh = type(block.mlp.act).__name__ == "GELUTanh" or getattr(block.mlp.act, "approximate", "none") == "tanh"
    return {
        "hidden_size": trunk.embed_dim,
        "num_hidden_layers": len(trunk.blocks),
        "intermediate_size": block.mlp.fc1.out_features,
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": trunk.norm.eps,
        "patch_size": _side(model, trunk.patch_embed.patch_size),
        "image_size": _side(model, vision.get("image_size", trunk.patch_embed.img_size)),
    }


def _unknown_to_timm(model: ModelFolder, name: str, fault: Exception) -> InputError:
    return model.fault(f"its image tower {name} is unknown to the installed timm ({fault}); update timm")


def _image_form(model: ModelFolder, given: dict, side: int) -> ImageForm:
    usual = DEFAULT_FORMS["clip"]
    how = given.get("resize_mode") or "shortest"
    if how not in _RESIZE:
        raise model.fault(f"{OPEN_CLIP_CONFIG}: resize_mode {how!r} is none of {', '.join(_RESIZE)}")
    interpolation = given.get("interpolation") or "bicubic"
    if interpolation not in MODES:
        raise model.fault(f"{OPEN_CLIP_CONFIG}: interpolation {interpolation!r} is none of {', '.join(MODES)}")
    resize = Resize(_RESIZE[how], interpolation=interpolation)
    return ImageForm(side, tuple(given.get("mean") or usual.mean), tuple(given.get("std") or usual.std), resize)


def _side(model: ModelFolder, size: int | list[int] | tuple[int, int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise model.fault(f"{OPEN_CLIP_CONFIG}: a size of {size} is not square, and only squares are read here")
    return sides.pop()


def _clip_tokenizer(model: ModelFolder) -> PreTrainedTokenizerBase:
    """CLIP's vocabulary of 49,408 tokens out of the package, as transformers' tokenizer."""
    remedy = "its folder has no tokenizer, and CLIP's vocabulary comes with open_clip: pip install open_clip_torch"
    with raised_as(lambda _: model.fault(remedy), ImportError):
        from open_clip.tokenizer import bytes_to_unicode, default_bpe
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
    letters = list(bytes_to_unicode().values())
    merges = [tuple(line.split()) for line in lines[1 : 49408 - 2 - 2 * len(letters) + 1]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)
