"""Folders of weights: config.json and model.safetensors, in transformers' form for its dual encoders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lib.data.durable import check_model, save_tensors
from lib.data.pipeline import ResizeFlag
from lib.files import write_text
from lib.towers.composed import saved_pair
from lib.towers.dual import load_dual
from lib.towers.model_files import ModelFolder, find_model, reading
from lib.towers.processing import read_settings
from lib.towers.tower import Parts
from lib.towers.weights import file_weights


def save_folder(folder: Path, description: dict, weights: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors.

    weights: a state dict of TwoTowers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if description["model_type"] != "two_towers":
        weights = file_weights(weights, description["model_type"])
    whole = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_tensors(whole, folder / "model.safetensors", {"format": "pt"})
    write_text(folder / "config.json", json.dumps(description, indent=2, sort_keys=True) + "\n")


def load_parts(name: str | Path | ModelFolder, image_size: int | None = None, resize: ResizeFlag = "auto") -> Parts:
    """Read a model of any of our kinds, by folder or hub id; config.json says which.

    image_size: another side than the model's own. resize: as in `lib.towers.measured_form.measured_form`.
    """
    model = find_model("--model", name)
    # Weights are drawn before they are read: a caller's random state is not to feel it.
    check_model(model.path)
    with reading(model.flag, model.name), torch.random.fork_rng(devices=[]):
        settings = read_settings(model)
        if settings["model_type"] == "two_towers":
            return saved_pair(settings, load_file(model.path / "model.safetensors"), model, image_size)
        return load_dual(model, settings, image_size, resize)
