"""How an encoder of transformers is fed, and what of its output counts as pooled."""

import inspect
import json

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lib.model_files import ModelFolder
from lib.towers.tower import Pooling

# The text halves of dual encoders.
TEXT_POOLINGS: dict[str, Pooling] = {
    "clip_text_model": "pooler",
    "altclip_text_model": "pooler",
    "chinese_clip_text_model": "cls",
    "siglip_text_model": "pooler",
    "siglip2_text_model": "pooler",
}
# What sentence-transformers calls the kinds of pooling, in its older and its newer files.
SENTENCE_POOLINGS: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}


def patch_size_of(trunk: nn.Module) -> int | None:
    """The side of the patches that an image encoder takes instead of images: SigLIP 2 of any resolution."""
    config = getattr(trunk, "config", None)
    return config.patch_size if config is not None and config.model_type == "siglip2_vision_model" else None


def needs_interpolation(trunk: nn.Module, image_size: int) -> bool:
    """Whether the encoder's position embeddings are for images of another side and can be interpolated."""
    own = getattr(getattr(trunk, "config", None), "image_size", image_size)
    known = inspect.signature(trunk.forward).parameters
    return own not in (image_size, [image_size] * 2, (image_size,) * 2) and "interpolate_pos_encoding" in known


@torch.no_grad()
def image_pooling(trunk: PreTrainedModel, pixel_values: Tensor, interpolate: bool) -> Pooling:
    """The encoder's own pooling; but a pooler with a dense layer belongs to a pre-training task: then [CLS].

    Checkpoints of classifiers come without such a pooler. A map that nothing pools is averaged.
    """
    if patch_size_of(trunk):
        return "pooler"
    fitting = {"interpolate_pos_encoding": True} if interpolate else {}
    output = trunk(pixel_values=pixel_values, **fitting)
    pooler = getattr(trunk, "pooler", None)
    dense = pooler is not None and any(isinstance(module, nn.Linear) for module in pooler.modules())
    if getattr(output, "pooler_output", None) is not None and not dense:
        return "pooler"
    return "mean" if output.last_hidden_state.ndim == 4 else "cls"


def text_pooling(model: ModelFolder, config: PretrainedConfig) -> Pooling:
    """What a sentence-transformers folder asks for, or a dual encoder's own; else the mean over tokens.

    The mean, because without training for sentences it says more about one than [CLS] does (Reimers and
    Gurevych 2019, arXiv:1908.10084, table 1).
    """
    if config.model_type in TEXT_POOLINGS:
        return TEXT_POOLINGS[config.model_type]
    file = model.path / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    settings = json.loads(file.read_text())
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    asked = settings.get("pooling_mode") or "+".join(mode.removeprefix("pooling_mode_") for mode in modes)
    if asked not in SENTENCE_POOLINGS:
        raise model.fault(f"it pools by {asked!r}; only the mean over tokens and [CLS] are known here")
    return SENTENCE_POOLINGS[asked]
