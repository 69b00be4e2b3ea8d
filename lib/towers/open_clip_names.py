"""Names of weights in open_clip's CLIP and SigLIP (with timm's image tower) and in TwoTowers, in both directions."""

from typing import NamedTuple

import torch
from torch import Tensor


class Layers(NamedTuple):
    """Where a tower keeps its layers here and in open_clip, and how open_clip names the modules within one."""

    ours: str
    theirs: str
    modules: dict[str, str]
    qkv: str
    """Before "weight" and "bias" of the one matrix that holds query, key and value."""


_IN_CLIP = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_IN_TIMM = {
    "layer_norm1": "norm1",
    "self_attn.out_proj": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
LAYERS = {
    "clip": (
        Layers("image.trunk.encoder.layers.", "visual.transformer.resblocks.", _IN_CLIP, "attn.in_proj_"),
        Layers("text.trunk.encoder.layers.", "transformer.resblocks.", _IN_CLIP, "attn.in_proj_"),
    ),
    "siglip": (
        Layers("image.trunk.encoder.layers.", "visual.trunk.blocks.", _IN_TIMM, "attn.qkv."),
        Layers("text.trunk.encoder.layers.", "text.transformer.resblocks.", _IN_CLIP, "attn.in_proj_"),
    ),
}
# By model type: our names outside the layers and open_clip's, whole or up to a dot.
NAMES = {
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
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
    },
    "siglip": {
        "image.trunk.embeddings.patch_embedding.": "visual.trunk.patch_embed.proj.",
        "image.trunk.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
        "image.trunk.post_layernorm.": "visual.trunk.norm.",
        "image.trunk.head.probe": "visual.trunk.attn_pool.latent",
        "image.trunk.head.attention.out_proj.": "visual.trunk.attn_pool.proj.",
        "image.trunk.head.layernorm.": "visual.trunk.attn_pool.norm.",
        "image.trunk.head.mlp.": "visual.trunk.attn_pool.mlp.",
        "text.trunk.embeddings.token_embedding.": "text.token_embedding.",
        "text.trunk.embeddings.position_embedding.weight": "text.positional_embedding",
        "text.trunk.final_layer_norm.": "text.ln_final.",
        "text.head.": "text.text_projection.",
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
    },
}
TRANSPOSED = ("visual.proj", "text_projection")
"""Multiplied from the right in open_clip."""
WITH_BATCH = ("visual.trunk.pos_embed",)
"""Of shape (1, ...) in timm."""
# SigLIP's pooling attention: one matrix for query, key and value here, two in timm.
_POOL, _POOL_Q, _POOL_KV = (
    "image.trunk.head.attention.in_proj_",
    "visual.trunk.attn_pool.q.",
    "visual.trunk.attn_pool.kv.",
)


def from_open_clip(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Weights of open_clip under the names of TwoTowers; unknown names stay as they are.

    model_type: "clip" or "siglip".
    """
    if model_type == "clip":  # with custom_text, open_clip keeps the text tower as a module of its own
        weights = {name.removeprefix("text."): value for name, value in weights.items()}
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        found |= _layer_from(name, value, model_type) or _other_from(name, value, model_type)
    for kind in ("weight", "bias"):
        if _POOL_Q + kind in found and _POOL_KV + kind in found:
            found[_POOL + kind] = torch.cat([found.pop(_POOL_Q + kind), found.pop(_POOL_KV + kind)])
    return found


def to_open_clip(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The reverse of `from_open_clip`: a state dict of TwoTowers under open_clip's names, with copied values."""
    found: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        theirs, part = _name_in_open_clip(name, model_type)
        if part:
            qkv.setdefault(theirs, {})[part] = value
        elif name.startswith(_POOL):
            kind, width = name.removeprefix(_POOL), len(value) // 3
            found |= {_POOL_Q + kind: value[:width].clone(), _POOL_KV + kind: value[width:].clone()}
        else:
            value = value.T if theirs in TRANSPOSED else value
            found[theirs] = (value[None] if theirs in WITH_BATCH else value).clone(
                memory_format=torch.contiguous_format
            )
    return found | {name: torch.cat([parts[each] for each in "qkv"]) for name, parts in qkv.items()}


def _layer_from(name: str, value: Tensor, model_type: str) -> dict[str, Tensor]:
    """Our weights of a weight within open_clip's layers; empty for one elsewhere."""
    for layers in LAYERS[model_type]:
        number, _, rest = name.removeprefix(layers.theirs).partition(".")
        if not name.startswith(layers.theirs):
            continue
        if rest.startswith(layers.qkv):
            kind, before = rest.removeprefix(layers.qkv), f"{layers.ours}{number}.self_attn."
            return {f"{before}{part}_proj.{kind}": each for part, each in zip("qkv", value.chunk(3), strict=True)}
        module, _, kind = rest.rpartition(".")
        ours = {theirs: ours for ours, theirs in layers.modules.items()}.get(module, module)
        return {f"{layers.ours}{number}.{ours}.{kind}": value}
    return {}


def _other_from(name: str, value: Tensor, model_type: str) -> dict[str, Tensor]:
    value = value.T if name in TRANSPOSED else value
    value = value[0] if name in WITH_BATCH else value
    for ours, theirs in NAMES[model_type].items():
        if name == theirs or (theirs.endswith(".") and name.startswith(theirs)):
            return {ours + name.removeprefix(theirs): value}
    return {name: value}


def _name_in_open_clip(name: str, model_type: str) -> tuple[str, str]:
    """The name there and, for the query, key or value of a layer, which of the three it is."""
    for layers in LAYERS[model_type]:
        number, _, rest = name.removeprefix(layers.ours).partition(".")
        if name.startswith(layers.ours):
            module, _, kind = rest.rpartition(".")
            if module in layers.modules:
                return f"{layers.theirs}{number}.{layers.modules[module]}.{kind}", ""
            return f"{layers.theirs}{number}.{layers.qkv}{kind}", module.removeprefix("self_attn.")[0]
    for ours, theirs in NAMES[model_type].items():
        if name == ours or (ours.endswith(".") and name.startswith(ours)):
            return theirs + name.removeprefix(ours), ""
    return name, ""
