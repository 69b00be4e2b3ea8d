"""Image classifiers of torchvision and timm without their classifier: `torchvision:resnet50`, `timm:NAME`.

A third part names the weights: `torchvision:resnet50:IMAGENET1K_V1`, or `:random` to start from scratch. A NAME of
timm is one of its models, or `local-dir:FOLDER` or `hf-hub:ID` for files in timm's format.
"""

import difflib
from collections.abc import Sequence
from math import floor
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models
from transformers import PretrainedConfig

from lib.data.pipeline import ResizeFlag
from lib.errors import InputError, raised_as
from lib.towers.image_form import DEFAULT_FORMS, ImageForm, Preparation, measured_form
from lib.towers.model_files import reason_of

SOURCES = ("torchvision", "timm")
Loaded = tuple[nn.Module, ImageForm, dict]
"""A classifier's layers up to its pooled features, the form of its images, and its settings for config.json."""
RANDOM = "random"


def is_classifier(name: str) -> bool:
    """A value of --image-tower names a model of torchvision or timm."""
    return name.partition(":")[0] in SOURCES and ":" in name


def is_timm(folder: Path) -> bool:
    """A folder has files in timm's format; newer ones have a model_type of transformers too."""
    settings, _ = PretrainedConfig.get_config_dict(folder)
    return "architecture" in settings and settings.get("model_type", "timm_wrapper") == "timm_wrapper"


def load_classifier(value: str, image_size: int | None, resize: ResizeFlag = "auto") -> Loaded:
    """A classifier with its pretrained weights, or with random ones if the name ends with `:random`.

    image_size: another side than the weights were made for. resize: as in `measured_form`. Raises InputError for an
    unknown name, for a missing package, for weights that are not here, and for a size that the model does not take.
    """
    source, _, rest = value.partition(":")
    return (_load_torchvision if source == "torchvision" else _load_timm)(rest, value, image_size, resize)


def new_classifier(settings: dict, image_size: int) -> nn.Module:
    """The layers of a classifier with random weights, from its settings in config.json."""
    name, options = settings["name"], settings.get("options", {})
    if settings["model_type"] == "torchvision":
        return _without_classifier(get_model(name, weights=None, **_sized(name, image_size)))
    model = _timm(f"timm:{name}").create_model(name, pretrained=False, **(options | {"num_classes": 0}))
    return _fitted(model, image_size)


def _load_torchvision(rest: str, value: str, image_size: int | None, resize: ResizeFlag) -> Loaded:
    name, _, weights = rest.partition(":")
    _check_known(value, name, list_models(module=torchvision.models))
    known = get_model_weights(name)
    if weights not in ("", RANDOM, *known.__members__):
        names = ", ".join(weights.name for weights in known)
        raise InputError(f"--image-tower {value}: {name} has the weights {names} and {RANDOM}")
    chosen = known[weights] if weights in known.__members__ else known.DEFAULT
    transform = chosen.transforms()
    sides = transform.crop_size[0], transform.resize_size[0]
    own = Preparation(transform, sides, transform.interpolation.value, (tuple(transform.mean), tuple(transform.std)))
    form = measured_form(own, DEFAULT_FORMS["two_towers"], f"--image-tower {value}", resize).at(image_size)
    if weights != RANDOM and _sized(name, form.size) and form.size != transform.crop_size[0]:
        raise InputError(
            f"--image-size {image_size}: {value} takes {transform.crop_size[0]}, its weights have no other"
        )
    url = chosen.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]

    def unreadable(fault: Exception) -> InputError:
        state = "cannot be read" if file.exists() else f"is not in {file.parent} and cannot be fetched"
        return InputError(
            f"--image-tower {value}: its file of weights {file.name} {state} ({reason_of(fault)}). Put {url} into "
            f"{file.parent}, or start from random weights with torchvision:{name}:{RANDOM}"
        )

    with raised_as(unreadable, OSError, RuntimeError, EOFError, UnpicklingError):
        model = get_model(name, weights=None if weights == RANDOM else chosen, **_sized(name, form.size))
    if hasattr(model, "transform_input"):  # Inception: further outputs while it trains
        raise InputError(f"--image-tower {value}: it has more than one classifier; use another model")
    return _without_classifier(model), form, {"model_type": "torchvision", "name": name}


def _load_timm(rest: str, value: str, image_size: int | None, resize: ResizeFlag) -> Loaded:
    timm = _timm(value)
    name = rest.removesuffix(f":{RANDOM}")
    source, colon, place = name.partition(":")
    if colon and source not in ("local-dir", "hf-hub"):
        raise InputError(
            f"--image-tower {value}: timm's names carry their weights (resnet50.a1_in1k), or end on :random"
        )
    if not colon and not timm.is_model(name):
        _check_known(value, name, timm.list_models())
    with raised_as(
        lambda fault: _not_loaded(value, fault),
        # timm raises some of these for a config.json that lacks something
        *(OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, UnpicklingError),
        EOFError,
    ):
        model = timm.create_model(name, pretrained=name == rest, num_classes=0)
    data = timm.data.resolve_data_config({}, model=model)
    sides = data["input_size"][-1], floor(data["input_size"][-1] / data["crop_pct"])
    transform = timm.data.create_transform(**data, is_training=False)
    own = Preparation(transform, sides, data["interpolation"], (tuple(data["mean"]), tuple(data["std"])))
    form = measured_form(own, DEFAULT_FORMS["two_towers"], f"--image-tower {value}", resize).at(image_size)
    settings = _architecture(place) if colon else {"name": name}
    return _fitted(model, form.size), form, {"model_type": "timm"} | settings


def _architecture(place: str) -> dict:
    """Settings that build the model again without its files; place: their folder, or a hub id (`ID@REVISION`)."""
    folder_or_id, _, revision = (place, "", "") if Path(place).is_dir() else place.partition("@")
    settings, _ = PretrainedConfig.get_config_dict(folder_or_id, revision=revision or None)
    return {"name": settings["architecture"], "options": settings.get("model_args") or {}}


def _not_loaded(value: str, fault: Exception) -> InputError:
    where = "Without a network they must be in the cache of the Hugging Face hub (HF_HOME is its folder)"
    if value.startswith("timm:local-dir:"):
        where = "Give a folder in timm's format: config.json with architecture and pretrained_cfg, model.safetensors"
    return InputError(
        f"--image-tower {value}: its weights cannot be loaded ({reason_of(fault)}). {where}; {value}:{RANDOM} starts "
        "from random weights"
    )


def _timm(value: str) -> ModuleType:
    remedy = f"--image-tower {value}: timm is not installed; pip install timm"
    with raised_as(lambda _: InputError(remedy), ImportError):
        import timm
    return timm


def _check_known(value: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise InputError(f"--image-tower {value}: no such model; the nearest is {value.partition(':')[0]}:{nearest}")


def _sized(name: str, image_size: int) -> dict[str, int]:
    """torchvision's ViTs are built for one side of the images; its other models take any, or say which."""
    return {"image_size": image_size} if name.startswith("vit_") else {}


def is_of_another_size(trunk: Any, image_size: int) -> bool:
    """A timm model that is built for one side of the images, and not for this one."""
    return hasattr(trunk, "set_input_size") and image_size != trunk.default_cfg["input_size"][-1]


def _fitted(trunk: Any, image_size: int) -> nn.Module:
    """A timm model for images of that side: transformers among them resize position embeddings and windows."""
    if is_of_another_size(trunk, image_size):
        trunk.set_input_size(img_size=image_size)
    return trunk


def _without_classifier(model: nn.Module) -> nn.Module:
    """Replace the layer of the classes: in torchvision's models always the last linear or convolutional one."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    model.set_submodule(layers[-1], nn.Identity())
    return model
