"""open_clip's layout of CLIP and SigLIP models: open_clip_config.json and its names of the weights.

The folder loads with `open_clip.create_model_from_pretrained("local-dir:FOLDER")` and `open_clip.get_tokenizer`. A
SigLIP's image tower is timm's there, of a name that timm knows or of the shape in the folder's config.json.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.data.durable import save_tensors
from lib.errors import InputError
from lib.export.formats import PROBABILITIES, Format, Sample, check_tokens, importing
from lib.files import write_text
from lib.towers import TwoTowers
from lib.towers.open_clip_files import to_open_clip
from lib.towers.processing import Processing

RESIZE = {"crop": "shortest", "squash": "squash", "pad": "longest"}
QUICK_GELU = {"quick_gelu": True, "gelu": False}
TEXT_ACTIVATIONS = {"gelu_pytorch_tanh": {"approximate": "tanh"}, "gelu": {}}  # of SigLIP's text tower
# timm's words for the sizes: width, layers, heads, units of the hidden layers.
TIMM_SIZES = {
    (768, 12, 12, 3072): "base",
    (1024, 24, 16, 4096): "large",
    (1152, 27, 16, 4304): "so400m",
    (1536, 40, 16, 6144): "giantopt",
}
TIMM_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
TIMM_EPS = 1e-6  # of its layer norms


def check(towers: TwoTowers) -> None:
    """Raise InputError where open_clip is not installed, or does not know the architecture."""
    with importing("open_clip", "open_clip_torch"):
        import open_clip  # noqa: F401
        import timm  # noqa: F401
    settings = towers.description
    if settings["model_type"] not in ("clip", "siglip"):
        raise InputError(
            f"--format open_clip is for CLIP models with a vision transformer and SigLIP; this one is of type "
            f"{settings['model_type']!r}: use --format hf, onnx or sentence-transformers"
        )
    vision, text = settings["vision_config"], settings["text_config"]
    siglip = settings["model_type"] == "siglip"
    faults = []
    known, used = TEXT_ACTIVATIONS if siglip else QUICK_GELU, {vision["hidden_act"], text["hidden_act"]}
    if used - {*known} or (not siglip and len(used) > 1):
        faults.append(f"its activations {vision['hidden_act']} (images) and {text['hidden_act']} (texts)")
    for part in (vision, text):
        if int(_mlp_ratio(part) * part["hidden_size"]) != part["intermediate_size"]:
            faults.append(f"a hidden layer of {part['intermediate_size']} units for {part['hidden_size']} dimensions")
    if vision["num_channels"] != 3:
        faults.append(f"images of {vision['num_channels']} channels")
    if siglip and vision["layer_norm_eps"] != TIMM_EPS:
        faults.append(f"layer norms of images with an epsilon of {vision['layer_norm_eps']}")
    if faults:
        raise InputError(f"--format open_clip: open_clip cannot express {'; '.join(faults)}; use --format hf or onnx")


def write(towers: TwoTowers, processing: Processing, folder: Path, repository: str | None = None) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors and the tokenizer's files.

    repository: the hub id that the folder will have; of a local folder open_clip takes the tokenizer in it.
    """
    resize = processing.resize
    if resize.side or resize.interpolation not in ("bicubic", "bilinear"):
        raise InputError(
            f"--format open_clip: open_clip cannot make images of {processing.image_size} pixels by {resize}; "
            "use --format hf or onnx"
        )
    settings = {
        "model_cfg": _model_settings(towers, processing, repository),
        "preprocess_cfg": {
            "size": processing.image_size,
            "mode": "RGB",
            "mean": list(processing.image_mean),
            "std": list(processing.image_std),
            "interpolation": processing.resize.interpolation,
            "resize_mode": RESIZE[processing.resize.way],
        },
    }
    _write_json(folder / "open_clip_config.json", settings)
    if _is_siglip(towers) and timm_name(towers.description["vision_config"]) is None:
        _write_json(folder / "config.json", _timm_shape(towers.description["vision_config"]))
    weights = open_clip_weights(towers, processing.max_length)
    save_tensors(weights, folder / "open_clip_model.safetensors", {"format": "pt"})
    processing.tokenizer.save_pretrained(folder)


def open_clip_weights(towers: TwoTowers, max_length: int) -> dict[str, Tensor]:
    """The weights under open_clip's names.

    max_length: of a SigLIP's texts, which open_clip pads to the number of positions.
    """
    weights = to_open_clip(towers.state_dict(), towers.description["model_type"])
    if _is_siglip(towers):
        weights["text.positional_embedding"] = weights["text.positional_embedding"][:max_length].clone()
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


@torch.no_grad()
def logits(towers: TwoTowers, processing: Processing, folder: Path, sample: Sample) -> Tensor:
    """Through open_clip alone: its model, and its own preparation of the images; its tokenizer is compared too."""
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    settings = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    if (folder / "config.json").exists():
        settings["timm_model_name"] = f"local-dir:{folder}"
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}", vision_cfg=settings)
    check_tokens(open_clip.get_tokenizer(f"local-dir:{folder}"), processing)
    images = torch.stack([prepare(to_pil_image(pixels)) for pixels in sample.pixel_values.cpu()])
    # It takes texts of full length only; CLIP ignores the tokens after the end token.
    missing = model.context_length - sample.input_ids.shape[1]
    texts = F.pad(sample.input_ids.cpu(), (0, missing), value=processing.tokenizer.pad_token_id)
    return model.eval().get_logits(images, texts)[0]


def usage(towers: TwoTowers, processing: Processing, name: str, on_hub: bool) -> str:
    where = f"hf-hub:{name}" if on_hub else f"local-dir:{name}"
    # For a local folder timm has to get the place, which open_clip does not pass on.
    shaped = not on_hub and _is_siglip(towers) and timm_name(towers.description["vision_config"]) is None
    settings = f"""
with open("{name}/open_clip_config.json") as file:
    settings = json.load(file)["model_cfg"]["vision_cfg"] | {{"timm_model_name": "{where}"}}"""
    return f"""{"import json" + chr(10) * 2 if shaped else ""}import open_clip
import torch
from PIL import Image
{settings if shaped else ""}
model, prepare = open_clip.create_model_from_pretrained("{where}"{", vision_cfg=settings" if shaped else ""})
tokenizer = open_clip.get_tokenizer("{where}")
texts, image = ["a photo of a cat", "a photo of a dog"], Image.open("picture.jpg")
with torch.no_grad():
    logits, _ = model.eval().get_logits(prepare(image)[None], tokenizer(texts))
{PROBABILITIES[towers.use_bias]}"""


def _is_siglip(towers: TwoTowers) -> bool:
    return towers.description["model_type"] == "siglip"


def _model_settings(towers: TwoTowers, processing: Processing, repository: str | None) -> dict:
    """The content of model_cfg; a SigLIP's is that of open_clip's own ViT-B-16-SigLIP.json."""
    vision, text = towers.description["vision_config"], towers.description["text_config"]
    named = {
        "vocab_size": text["vocab_size"],
        "heads": text["num_attention_heads"],
        "hf_tokenizer_name": repository or "tokenizer",
    }
    bias = {"init_logit_bias": towers.logit_bias.item()} if towers.use_bias else {}
    if _is_siglip(towers):
        activation = TEXT_ACTIVATIONS[text["hidden_act"]]
        kind: dict = {"custom_text": True}
        vision_cfg = {
            "image_size": vision["image_size"],
            "timm_model_name": timm_name(vision) or (f"hf-hub:{repository}" if repository else "local-dir:."),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
        text_cfg = (
            _encoder_settings(text)
            | named
            | {"context_length": processing.max_length, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
            | ({"tokenizer_kwargs": {"clean": "canonicalize"}} if processing.canonical else {})
            | ({"act_kwargs": activation} if activation else {})
        )
    else:
        kind = {"quick_gelu": QUICK_GELU[vision["hidden_act"]]}
        vision_cfg = _encoder_settings(vision) | {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        }
        # transformers takes 2 as the mark of old files, and pools at the highest token.
        pooling = {"pool_type": "argmax" if text["eos_token_id"] == 2 else "eos"}
        ends = {"context_length": text["max_position_embeddings"], "eos_id": text["eos_token_id"]}
        text_cfg = _encoder_settings(text) | pooling | named | ends
    return {"embed_dim": towers.embed_dim} | kind | {"vision_cfg": vision_cfg, "text_cfg": text_cfg} | bias


def _encoder_settings(part: dict) -> dict:
    return {
        "layers": part["num_hidden_layers"],
        "width": part["hidden_size"],
        "mlp_ratio": _mlp_ratio(part),
        "norm_kwargs": {"eps": part["layer_norm_eps"]},
    }


def _write_json(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content, indent=2) + "\n")


def timm_name(vision: dict) -> str | None:
    """The model of timm with this vision_config of SigLIP; None where no name has its shape, size and activation."""
    import timm

    name = f"vit_{TIMM_SIZES.get(_shape(vision))}_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        activation = timm.create_model(name).blocks[0].mlp.act
    # timm's base and large models have the exact GELU, transformers' SigLIP its approximation by tanh.
    exact = isinstance(activation, torch.nn.GELU) and activation.approximate == "none"
    return name if exact == (vision["hidden_act"] == "gelu") else None


def _timm_shape(vision: dict) -> dict:
    """The content of timm's config.json for a vision_config of SigLIP."""
    width, layers, heads, _ = _shape(vision)
    side = vision["image_size"]
    return {
        "architecture": "vit_base_patch16_siglip_224",  # its settings are all given here
        "num_classes": 0,
        "model_args": {
            "img_size": side,
            "patch_size": vision["patch_size"],
            "embed_dim": width,
            "depth": layers,
            "num_heads": heads,
            "mlp_ratio": _mlp_ratio(vision),
            "act_layer": TIMM_ACTIVATIONS[vision["hidden_act"]],
        },
        "pretrained_cfg": {"input_size": [3, side, side]},
    }


def _mlp_ratio(part: dict) -> float:
    """Units of the hidden layers for each dimension."""
    return part["intermediate_size"] / part["hidden_size"]


def _shape(part: dict) -> tuple[int, int, int, int]:
    return part["hidden_size"], part["num_hidden_layers"], part["num_attention_heads"], part["intermediate_size"]


OPEN_CLIP = Format(check, write, logits, usage, "open_clip")
