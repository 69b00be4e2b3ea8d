"""open_clip's CLIP and SigLIP (with image towers of timm): settings as those of transformers, and names of weights."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from lib.data.pipeline import MODES, Resize, Way
from lib.errors import InputError, raised_as
from lib.towers.image_form import DEFAULT_FORMS, ImageForm
from lib.towers.model_files import CONFIG, OPEN_CLIP_CONFIG, ModelFolder

_RESIZE: dict[str, Way] = {"shortest": "crop", "squash": "squash", "longest": "pad"}


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
    content = open_clip_content(model)
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


def open_clip_content(model: ModelFolder) -> dict:
    """The content of open_clip_config.json."""
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
    options = part.get("act_kwargs") or {}
    if options not in ({}, {"approximate": "tanh"}) or (options and quick_gelu):
        raise model.fault(f"{OPEN_CLIP_CONFIG}: an activation with act_kwargs {options} cannot be read")
    return {
        "hidden_size": part["width"],
        "num_hidden_layers": part["layers"],
        "intermediate_size": int(part["width"] * part.get("mlp_ratio", 4.0)),
        "hidden_act": "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if options else "gelu",
        "layer_norm_eps": (part.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _timm_config(model: ModelFolder, vision: dict) -> dict:
    """The sizes of SigLIP's image encoder, of which open_clip's settings give nothing but timm's name."""
    name = vision["timm_model_name"]
    with raised_as(lambda _: model.fault(f"its image tower {name} is timm's: pip install timm"), ImportError):
        import timm
        from timm.layers import AttentionPoolLatent
        from timm.models import VisionTransformer
    # A shape without a name is in config.json next to the weights, in timm's own format, and the name is a place.
    own = name.startswith(("local-dir:", "hf-hub:")) and (model.path / CONFIG).is_file()

    def unknown(fault: Exception) -> InputError:
        return model.fault(f"its image tower {name} is unknown to the installed timm ({fault}); update timm")

    with torch.device("meta"), raised_as(unknown, RuntimeError):  # structure alone: no memory, no weights
        trunk = timm.create_model(f"local-dir:{model.path}" if own else name, num_classes=0, global_pool="map")
    if not isinstance(trunk, VisionTransformer) or not isinstance(trunk.attn_pool, AttentionPoolLatent):
        raise model.fault(f"its image tower {name} is no vision transformer of SigLIP: no other of timm's can be read")
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


# Our names of modules and those of open_clip: whole, or up to a dot or underscore. "qkv" and "kv" are matrices that
# open_clip holds in one piece, and transformers in several.
_IN_CLIP = {
    "layer_norm1.": "ln_1.",
    "self_attn.qkv.": "attn.in_proj_",
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_IN_TIMM = {
    "layer_norm1.": "norm1.",
    "self_attn.qkv.": "attn.qkv.",
    "self_attn.out_proj.": "attn.proj.",
    "layer_norm2.": "norm2.",
}
_LAYERS = {
    "clip": (
        ("image.trunk.encoder.layers.", "visual.transformer.resblocks.", _IN_CLIP),
        ("text.trunk.encoder.layers.", "transformer.resblocks.", _IN_CLIP),
    ),
    "siglip": (
        ("image.trunk.encoder.layers.", "visual.trunk.blocks.", _IN_TIMM),
        ("text.trunk.encoder.layers.", "text.transformer.resblocks.", _IN_CLIP),
    ),
}
_POOL = "image.trunk.head.attention."
_OUTSIDE_LAYERS = {
    "clip": {
        "image.trunk.embeddings.class_embedding": "visual.class_embedding",
        "image.trunk.embeddings.patch_embedding.": "visual.conv1.",
        "image.trunk.embeddings.position_embedding.weight": "visual.positional_embedding",
        "image.trunk.pre_layrnorm.": "visual.ln_pre.",
        "image.trunk.post_layernorm.": "visual.ln_post.",
        "image.head.weight": "visual.proj",
        "text.trunk.embeddings.token_embedding.": "token_embedding.",
        "text.trunk.embeddings.position_embedding.weight": "positional_embedding",
        "text.trunk.final_layer_norm.": "ln_final.",
        "text.head.weight": "text_projection",
    },
    "siglip": {
        "image.trunk.embeddings.patch_embedding.": "visual.trunk.patch_embed.proj.",
        "image.trunk.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
        "image.trunk.post_layernorm.": "visual.trunk.norm.",
        "image.trunk.head.probe": "visual.trunk.attn_pool.latent",
        f"{_POOL}q.": "visual.trunk.attn_pool.q.",
        f"{_POOL}kv.": "visual.trunk.attn_pool.kv.",
        f"{_POOL}out_proj.": "visual.trunk.attn_pool.proj.",
        "image.trunk.head.layernorm.": "visual.trunk.attn_pool.norm.",
        "image.trunk.head.mlp.": "visual.trunk.attn_pool.mlp.",
        "text.trunk.embeddings.token_embedding.": "text.token_embedding.",
        "text.trunk.embeddings.position_embedding.weight": "text.positional_embedding",
        "text.trunk.final_layer_norm.": "text.ln_final.",
        "text.head.": "text.text_projection.",
    },
}
_TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies with these from the right
_WITH_BATCH = ("visual.trunk.pos_embed",)  # of shape (1, ...) in timm
_QKV = re.compile(r"\.self_attn\.([qkv])_proj\.")


def from_open_clip(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Weights of open_clip under the names of TwoTowers; unknown names stay as they are.

    model_type: "clip" or "siglip".
    """
    if model_type == "clip":  # with custom_text, open_clip keeps the text tower as a module of its own
        weights = {name.removeprefix("text."): value for name, value in weights.items()}
    found: dict[str, Tensor] = {}
    for theirs, value in weights.items():
        name = _translated(theirs, model_type, back=True)
        value = value.T if theirs in _TRANSPOSED else value
        if ".self_attn.qkv." in name:
            thirds = zip("qkv", value.chunk(3), strict=True)
            found |= {name.replace(".qkv.", f".{letter}_proj."): third for letter, third in thirds}
        else:
            found[name] = value[0] if theirs in _WITH_BATCH else value
    for kind in ("weight", "bias"):
        query, others = f"{_POOL}q.{kind}", f"{_POOL}kv.{kind}"
        if query in found and others in found:
            found[f"{_POOL}in_proj_{kind}"] = torch.cat([found.pop(query), found.pop(others)])
    return found


def to_open_clip(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The reverse of `from_open_clip`: a state dict of TwoTowers under open_clip's names, with copied values."""
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        if letter := _QKV.search(name):
            thirds.setdefault(_QKV.sub(".self_attn.qkv.", name), {})[letter[1]] = value
        elif name.startswith(f"{_POOL}in_proj_"):
            kind, width = name.removeprefix(f"{_POOL}in_proj_"), len(value) // 3
            found |= {f"{_POOL}q.{kind}": value[:width], f"{_POOL}kv.{kind}": value[width:]}
        else:
            found[name] = value
    found |= {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in thirds.items()}
    return {
        theirs: _shaped(value, theirs).clone(memory_format=torch.contiguous_format)
        for theirs, value in ((_translated(name, model_type), value) for name, value in found.items())
    }


def _shaped(value: Tensor, theirs: str) -> Tensor:
    value = value.T if theirs in _TRANSPOSED else value
    return value[None] if theirs in _WITH_BATCH else value


def _translated(name: str, model_type: str, *, back: bool = False) -> str:
    """Our name in open_clip; back: open_clip's name here."""
    for layers in _LAYERS[model_type]:
        (before, after), within = reversed(layers[:2]) if back else layers[:2], layers[2]
        if name.startswith(before):
            number, _, rest = name.removeprefix(before).partition(".")
            return f"{after}{number}.{renamed(rest, _turned(within) if back else within)}"
    outside = _OUTSIDE_LAYERS[model_type]
    return renamed(name, _turned(outside) if back else outside)


def _turned(names: Mapping[str, str]) -> dict[str, str]:
    return {after: before for before, after in names.items()}


def renamed(name: str, names: Mapping[str, str]) -> str:
    """The name with its first match in `names`, whole or up to a dot or underscore, replaced; else unchanged."""
    for before, after in names.items():
        if name == before or (before[-1] in "._" and name.startswith(before)):
            return after + name.removeprefix(before)
    return name
