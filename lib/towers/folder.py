"""Folders of weights: config.json and model.safetensors, in transformers' form for its dual encoders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.model_files import ModelFolder, find_model, reading
from lib.processing import read_settings
from lib.towers.composed import saved_pair
from lib.towers.dual import load_dual
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
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def load_parts(name: str | Path | ModelFolder, image_size: int | None = None) -> Parts:
    """Read a model of any of our kinds, by folder or hub id; config.json says which.

    image_size: another side than the model's own.
    """
    model = find_model("--model", name)
    # Weights are drawn before they are read: a caller's random state is not to feel it.
    with reading(model.flag, model.name), torch.random.fork_rng(devices=[]):
        settings = read_settings(model)
        if settings["model_type"] == "two_towers":
            return saved_pair(settings, load_file(model.path / "model.safetensors"), model, image_size)
        return load_dual(model, settings, image_size)
