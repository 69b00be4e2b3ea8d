"""Folders of weights: config.json and model.safetensors, in transformers' form for its dual encoders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from lib.durable import check_model, save_tensors
from lib.processing import check_model_type
from lib.redaction import write_text
from lib.towers.composed import saved_pair
from lib.towers.dual import file_weights, load_dual
from lib.towers.encoders import reading
from lib.towers.tower import Parts


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


def load_parts(folder_or_id: str | Path, image_size: int | None = None) -> Parts:
    """Read a model of any of our kinds; config.json says which.

    image_size: another side than the model's own.
    """
    # Weights are drawn before they are read: a caller's random state is not to feel it.
    check_model(Path(folder_or_id))
    with reading("--model", folder_or_id), torch.random.fork_rng(devices=[]):
        settings, _ = PretrainedConfig.get_config_dict(folder_or_id)
        check_model_type(folder_or_id, settings)
        if settings["model_type"] == "two_towers":
            weights = load_file(Path(folder_or_id) / "model.safetensors")
            return saved_pair(settings, weights, folder_or_id, image_size)
        return load_dual(folder_or_id, settings, image_size)
