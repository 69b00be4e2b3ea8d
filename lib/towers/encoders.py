"""Encoders of transformers by folder or hub id: one half of a pair each, its pooling, and clear errors."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipModel,
    SiglipTextModel,
)
from transformers.utils import cached_file, logging

from lib.errors import InputError
from lib.towers.tower import Pooling

DUAL_MODELS = {"clip": CLIPModel, "siglip": SiglipModel}
# What sentence-transformers calls the kinds of pooling, in its older and its newer files.
SENTENCE_POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notes back: they are about parts that we leave out on purpose."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def reading(flag: str, value: str | Path) -> Iterator[None]:
    """Load something of transformers quietly; what cannot be loaded raises InputError for the flag."""
    try:
        with quiet():
            yield
    except InputError:
        raise
    except ImportError as error:
        reason = str(error).strip().split(". ")[0]
        raise InputError(f"{flag} {value}: needs a package that is not installed ({reason})") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{flag} {value}: cannot be loaded ({reason}). Give a local folder with config.json and "
            "model.safetensors, or an id of the Hugging Face hub; without a network an id works if the model "
            "is in the cache already (HF_HOME says where that is)"
        ) from error


def load_model(
    model_class: type[PreTrainedModel] | type[AutoModel], name: str | Path
) -> tuple[PreTrainedModel, set[str]]:
    """Load weights in float32; returns the model and the names of weights that the files lack."""
    model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    return model, set(report["missing_keys"])


def load_image_encoder(name: str | Path) -> tuple[PreTrainedModel, set[str]]:
    """The image encoder of that name, or the image half of a CLIP or SigLIP; and the weights it lacks."""
    trunk, missing = _load_half(name, "vision_model")
    if trunk.main_input_name != "pixel_values":
        raise InputError(f"--image-tower {name}: a model of type {trunk.config.model_type!r} does not read images")
    return trunk, missing


def load_text_encoder(name: str | Path) -> tuple[PreTrainedModel, set[str]]:
    """The text encoder of that name, or the text half of a CLIP or SigLIP; and the weights it lacks."""
    trunk, missing = _load_half(name, "text_model")
    if trunk.main_input_name != "input_ids" or trunk.config.is_encoder_decoder:
        kind = trunk.config.model_type
        raise InputError(f"--text-tower {name}: a model of type {kind!r} is not a text encoder without a decoder")
    return trunk, missing


def new_encoder(settings: dict) -> PreTrainedModel:
    """An encoder with drawn weights from the settings in its config.json."""
    config = AutoConfig.for_model(**settings)
    if config.model_type == "siglip_text_model":  # AutoModel knows SigLIP's image half alone, not its text half
        return SiglipTextModel(config)
    return AutoModel.from_config(config, dtype=torch.float32)


def _load_half(name: str | Path, half: str) -> tuple[PreTrainedModel, set[str]]:
    model_type = AutoConfig.from_pretrained(name).model_type
    if model_type not in DUAL_MODELS:
        return load_model(SiglipTextModel if model_type == "siglip_text_model" else AutoModel, name)
    model, missing = load_model(DUAL_MODELS[model_type], name)
    prefix = f"{half}."
    return getattr(model, half), {key.removeprefix(prefix) for key in missing if key.startswith(prefix)}


def needs_interpolation(trunk: PreTrainedModel, image_size: int) -> bool:
    """Whether the encoder's position embeddings are for images of another side and can be interpolated."""
    own = getattr(trunk.config, "image_size", image_size)
    known = inspect.signature(trunk.forward).parameters
    return own not in (image_size, [image_size] * 2, (image_size,) * 2) and "interpolate_pos_encoding" in known


@torch.no_grad()
def image_pooling(trunk: PreTrainedModel, pixel_values: Tensor, interpolate: bool) -> Pooling:
    """The encoder's own pooling; but a pooler with a dense layer belongs to a pre-training task: then [CLS].

    Checkpoints of classifiers come without such a pooler. A map that nothing pools is averaged.
    """
    fitting = {"interpolate_pos_encoding": True} if interpolate else {}
    output = trunk(pixel_values=pixel_values, **fitting)
    pooler = getattr(trunk, "pooler", None)
    dense = pooler is not None and any(isinstance(module, nn.Linear) for module in pooler.modules())
    if getattr(output, "pooler_output", None) is not None and not dense:
        return "pooler"
    return "mean" if output.last_hidden_state.ndim == 4 else "cls"


def text_pooling(name: str | Path, config: PretrainedConfig) -> Pooling:
    """What a sentence-transformers folder asks for, or CLIP's and SigLIP's own; else the mean over tokens.

    The mean, because without training for sentences it says more about one than [CLS] does (Reimers and
    Gurevych 2019, arXiv:1908.10084, table 1).
    """
    if config.model_type.startswith(("clip", "siglip")):
        return "pooler"
    file = cached_file(
        name,
        "1_Pooling/config.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return "mean"
    settings = json.loads(Path(file).read_text())
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    asked = settings.get("pooling_mode") or "+".join(mode.removeprefix("pooling_mode_") for mode in modes)
    if asked not in SENTENCE_POOLINGS:
        raise InputError(
            f"--text-tower {name}: it pools by {asked!r}; only the mean over tokens and [CLS] are known here"
        )
    return SENTENCE_POOLINGS[asked]


def check_and_settle(trunk: nn.Module, pooled: Tensor, missing: set[str], flag: str, name: str | Path) -> None:
    """Stop training what the pooled output does not depend on; what it depends on must not be missing.

    pooled: (1, H), with its graph. Unused parts are poolers and mask tokens; DistributedDataParallel would
    wait for their gradients.
    """
    parameters = dict(trunk.named_parameters())
    gradients = torch.autograd.grad(pooled.sum(), list(parameters.values()), allow_unused=True)
    used = {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in used)
    check_complete(missing & used, flag, name)


def check_complete(missing: set[str], flag: str, name: str | Path) -> None:
    """Refuse a model whose files lack weights: they would be random numbers."""
    if missing:
        raise InputError(
            f"{flag} {name}: the files lack {len(missing)} of the model's weights, {min(missing)} among "
            "them; is it the right folder, and whole?"
        )
