"""Export: a trained model in its Hugging Face layout, checked by loading it again and comparing logits."""

import os
import shutil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from lib.errors import RunError
from lib.processing import Processing
from lib.towers import TwoTowers
from lib.towers.encoders import quiet

TOLERANCE = 1e-4


class Sample(Protocol):
    """A few pairs, such as a chunk of the training data: uint8 pixels (n, 3, H, W) and tokens (n, L)."""

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor


def export(towers: TwoTowers, processing: Processing, folder: str | Path, sample: Sample) -> float:
    """Write the folder whole or not at all; returns the largest difference in a logit after loading it.

    A CLIP or SigLIP model is loaded with transformers' AutoModel and AutoProcessor, any other with
    `TwoTowers.from_pretrained`. Above a difference of 1e-4 it raises RunError; an older folder stays.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        towers.save_pretrained(unfinished)
        processing.save_pretrained(unfinished)
        difference = _difference(towers, processing, unfinished, sample)
        if not difference <= TOLERANCE:  # a NaN is a failure too
            raise RunError(f"the export to {folder} differs from the model by {difference:.2e} in a logit")
        _replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


def _difference(towers: TwoTowers, processing: Processing, folder: Path, sample: Sample) -> float:
    """Largest difference between the logits of the towers and those of the folder."""
    expected = _logits_of_towers(towers, sample)
    with quiet():
        if processing.model_type == "two_towers":
            loaded = TwoTowers.from_pretrained(folder).to(expected.device, expected.dtype)
            found = _logits_of_towers(loaded, sample)
        else:
            # transformers' CLIP has no bias; its softmax over images or texts would not feel one.
            bias = towers.logit_bias if processing.model_type == "clip" else 0.0
            found = _logits_of_transformers(folder, sample, expected) + bias
    return (found - expected).abs().max().item()


@torch.no_grad()
def _logits_of_towers(towers: TwoTowers, sample: Sample) -> Tensor:
    device, training = towers.logit_scale.device, towers.training
    towers.eval()
    output = towers(sample.pixel_values.to(device), sample.input_ids.to(device), sample.attention_mask.to(device))
    towers.train(training)
    return output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias


@torch.no_grad()
def _logits_of_transformers(folder: Path, sample: Sample, like: Tensor) -> Tensor:
    """Through transformers alone, as a user of the exported folder would; like: gives device and dtype."""
    model = AutoModel.from_pretrained(folder, dtype=like.dtype).to(like.device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    images = processor.image_processor(list(sample.pixel_values.cpu()), return_tensors="pt")
    # SigLIP is not told which tokens are padding.
    mask = None if model.config.model_type == "siglip" else sample.attention_mask.to(like.device)
    output = model(
        pixel_values=images["pixel_values"].to(like),
        input_ids=sample.input_ids.to(like.device),
        attention_mask=mask,
    )
    return output.logits_per_image


def _replace(unfinished: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one, if there is one."""
    outdated = folder.with_name(f".{folder.name}.outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if folder.exists():
        os.rename(folder, outdated)
    os.rename(unfinished, folder)
    shutil.rmtree(outdated, ignore_errors=True)
