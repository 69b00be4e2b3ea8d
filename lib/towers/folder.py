"""Folders of weights: config.json and model.safetensors, in transformers' form for its dual encoders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from lib.data.resize import ResizeFlag
from lib.processing import check_model_type
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
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def load_parts(folder_or_id: str | Path, image_size: int | None = None, resize: ResizeFlag = "auto") -> Parts:
    """Read a model of any of our kinds; config.json says which.

    image_size: another side than the model's own. resize: as in `lib.measured_form.measured_form`.
    """
    # Weights are drawn before they are read: a caller's random state is not to feel it.
    with reading("--model", folder_or_id), torch.random.fork_rng(devices=[]):
        settings, _ = PretrainedConfig.get_config_dict(folder_or_id)
        check_model_type(folder_or_id, settings)
        if settings["model_type"] == "two_towers":
            weights = load_file(Path(folder_or_id) / "model.safetensors")
            return saved_pair(settings, weights, folder_or_id, image_size)
        return load_dual(folder_or_id, settings, image_size, resize)
