"""Owns open_clip's layout of a CLIP with a vision transformer: open_clip_config.json and its names of the weights.

The folder loads with `open_clip.create_model_from_pretrained("local-dir:FOLDER")` and `open_clip.get_tokenizer`.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lib.errors import InputError
from lib.export.sample import PROBABILITIES, Sample
from lib.processing import Processing
from lib.towers import TwoTowers

# Our names and open_clip's, whole or up to a dot.
NAMES = {
    "image.trunk.embeddings.class_embedding": "visual.class_embedding",
    "image.trunk.embeddings.patch_embedding.": "visual.conv1.",
    "image.trunk.embeddings.position_embedding.weight": "visual.positional_embedding",
    "image.trunk.pre_layrnorm.": "visual.ln_pre.",
    "image.trunk.encoder.layers.": "visual.transformer.resblocks.",
    "image.trunk.post_layernorm.": "visual.ln_post.",
    "image.head.weight": "visual.proj",
    "text.trunk.embeddings.token_embedding.": "token_embedding.",
    "text.trunk.embeddings.position_embedding.weight": "positional_embedding",
    "text.trunk.encoder.layers.": "transformer.resblocks.",
    "text.trunk.final_layer_norm.": "ln_final.",
    "text.head.weight": "text_projection",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
IN_BLOCK = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies from the right
RESIZE = {"crop": "shortest", "squash": "squash", "pad": "longest"}
QUICK_GELU = {"quick_gelu": True, "gelu": False}


def check(towers: TwoTowers) -> None:
    """Raise InputError where open_clip is not installed, or does not know the architecture."""
    try:
        import open_clip  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--format open_clip checks the files with open_clip, which cannot be imported ({error}): "
            "pip install open_clip_torch"
        ) from error
    settings = towers.description
    if settings["model_type"] != "clip":
        raise InputError(
            f"--format open_clip is for CLIP models with a vision transformer; this one is of type "
            f"{settings['model_type']!r}: use --format hf or onnx"
        )
    vision, text = settings["vision_config"], settings["text_config"]
    faults = []
    if vision["hidden_act"] != text["hidden_act"] or vision["hidden_act"] not in QUICK_GELU:
        faults.append(f"its activations {vision['hidden_act']} (images) and {text['hidden_act']} (texts)")
    for part in (vision, text):
        mlp_ratio = part["intermediate_size"] / part["hidden_size"]
        if int(mlp_ratio * part["hidden_size"]) != part["intermediate_size"]:
            faults.append(f"a hidden layer of {part['intermediate_size']} units for {part['hidden_size']} dimensions")
    if vision["num_channels"] != 3:
        faults.append(f"images of {vision['num_channels']} channels")
    if faults:
        raise InputError(f"--format open_clip: open_clip cannot express {'; '.join(faults)}; use --format hf or onnx")


def write(towers: TwoTowers, processing: Processing, folder: Path, tokenizer_name: str = "tokenizer") -> None:
    """Write open_clip_config.json, open_clip_model.safetensors and the tokenizer's files.

    tokenizer_name: the hub id that the folder will have; of a local folder open_clip takes the files in it.
    """
    resize = processing.resize
    if resize.side or resize.interpolation not in ("bicubic", "bilinear"):
        raise InputError(
            f"--format open_clip: open_clip cannot make images of {processing.image_size} pixels by {resize}; "
            "use --format hf or onnx"
        )
    settings = {
        "model_cfg": _model_settings(towers, tokenizer_name),
        "preprocess_cfg": {
            "size": processing.image_size,
            "mode": "RGB",
            "mean": list(processing.image_mean),
            "std": list(processing.image_std),
            "interpolation": processing.resize.interpolation,
            "resize_mode": RESIZE[processing.resize.way],
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(open_clip_weights(towers), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    processing.tokenizer.save_pretrained(folder)


def open_clip_weights(towers: TwoTowers) -> dict[str, Tensor]:
    """The weights under open_clip's names: query, key and value in one matrix, projections transposed."""
    weights: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in towers.state_dict().items():
        value = value.detach().cpu()
        known = next(ours for ours in NAMES if name == ours or (ours.endswith(".") and name.startswith(ours)))
        theirs = NAMES[known] + name.removeprefix(known)
        block = re.fullmatch(r"(.+\.resblocks\.\d+)\.(.+)\.(weight|bias)", theirs)
        if block and block[2] in IN_BLOCK:
            theirs = f"{block[1]}.{IN_BLOCK[block[2]]}.{block[3]}"
        elif block:
            parts.setdefault(f"{block[1]}.attn.in_proj_{block[3]}", {})[block[2]] = value
            continue
        weights[theirs] = (value.T if theirs in TRANSPOSED else value).contiguous().clone()
    order = [f"self_attn.{part}_proj" for part in "qkv"]
    return weights | {name: torch.cat([part[which] for which in order]) for name, part in parts.items()}


@torch.no_grad()
def logits(towers: TwoTowers, processing: Processing, folder: Path, sample: Sample) -> Tensor:
    """Through open_clip alone: its model, and its own preparation of the images."""
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    images = torch.stack([prepare(to_pil_image(pixels)) for pixels in sample.pixel_values.cpu()])
    # It wants every text at full length; what comes behind the end token is not looked at.
    missing = model.context_length - sample.input_ids.shape[1]
    texts = F.pad(sample.input_ids.cpu(), (0, missing), value=processing.tokenizer.pad_token_id)
    return model.eval().get_logits(images, texts)[0]


def usage(towers: TwoTowers, processing: Processing, name: str, on_hub: bool) -> str:
    """Python that loads the files and gets logits; name: a hub id or a folder."""
    where = f"hf-hub:{name}" if on_hub else f"local-dir:{name}"
    return f"""import open_clip
import torch
from PIL import Image

model, prepare = open_clip.create_model_from_pretrained("{where}")
tokenizer = open_clip.get_tokenizer("{where}")
texts, image = ["a photo of a cat", "a photo of a dog"], Image.open("picture.jpg")
with torch.no_grad():
    logits, _ = model.eval().get_logits(prepare(image)[None], tokenizer(texts))
{PROBABILITIES[towers.use_bias]}"""


def _model_settings(towers: TwoTowers, tokenizer_name: str) -> dict:
    vision, text = towers.description["vision_config"], towers.description["text_config"]
    # transformers takes 2 as the mark of old files, and pools at the highest token.
    pooling = {"pool_type": "argmax"} if text["eos_token_id"] == 2 else {"pool_type": "eos"}
    settings = {
        "embed_dim": towers.embed_dim,
        "quick_gelu": QUICK_GELU[vision["hidden_act"]],
        "vision_cfg": _encoder_settings(vision)
        | {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        "text_cfg": _encoder_settings(text)
        | pooling
        | {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            "eos_id": text["eos_token_id"],
            "hf_tokenizer_name": tokenizer_name,
        },
    }
    return settings | ({"init_logit_bias": towers.logit_bias.item()} if towers.use_bias else {})


def _encoder_settings(part: dict) -> dict:
    return {
        "layers": part["num_hidden_layers"],
        "width": part["hidden_size"],
        "mlp_ratio": part["intermediate_size"] / part["hidden_size"],
        "norm_kwargs": {"eps": part["layer_norm_eps"]},
    }
