"""The Hugging Face layout: config.json, model.safetensors, tokenizer and image processor.

A CLIP or SigLIP model loads with transformers' AutoModel and AutoProcessor, a composed pair of towers with
`TwoTowers.from_pretrained` and `Processing.from_pretrained`.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from lib.export.formats import PROBABILITIES, Format, Sample, expected_logits, normalized
from lib.towers import TwoTowers
from lib.towers.model_files import NO_CODE
from lib.towers.processing import Processing

COMPOSED = "two_towers"


def write(towers: TwoTowers, processing: Processing, folder: Path) -> None:
    """Write model, tokenizer and image processor."""
    towers.save_pretrained(folder)
    processing.save_pretrained(folder)


@torch.no_grad()
def logits(towers: TwoTowers, processing: Processing, folder: Path, sample: Sample) -> Tensor:
    """The folder's logits, on the towers' device and in their dtype; through transformers alone where it can."""
    like = towers.logit_scale
    if processing.model_type == COMPOSED:
        return expected_logits(TwoTowers.from_pretrained(folder).to(like.device, like.dtype), sample)
    model = AutoModel.from_pretrained(folder, dtype=like.dtype, **NO_CODE).to(like.device).eval()
    processor = AutoProcessor.from_pretrained(folder, **NO_CODE)
    images = normalized(processor.image_processor, processing, sample, "pt")
    output = model(
        **images.to(like.device, like.dtype),  # pixels; for SigLIP 2 patches, their mask and shape
        input_ids=sample.input_ids.to(like.device),
        attention_mask=sample.attention_mask.to(like.device) if towers.text.masked else None,
    )
    return output.logits_per_image + _added_bias(towers, processing)


def _added_bias(towers: TwoTowers, processing: Processing) -> float:
    """The summand that the logits of transformers lack: its SigLIP has a bias, its other models have none."""
    return 0.0 if processing.model_type.startswith("siglip") else towers.logit_bias.item()


def usage(towers: TwoTowers, processing: Processing, name: str, on_hub: bool) -> str:
    if processing.model_type == COMPOSED:
        return _usage_of_composed(towers, name, on_hub)
    bias = _added_bias(towers, processing)
    summand = f" + {bias!r}  # transformers' own model has no bias" if bias else ""
    # SigLIP takes no mask of padding; and its processor as a whole has settings of its own for both inputs.
    tokens = "**tokens" if towers.text.masked else 'input_ids=tokens["input_ids"]'
    return f"""import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}").eval()
processor = AutoProcessor.from_pretrained("{name}")
texts, image = ["a photo of a cat", "a photo of a dog"], Image.open("picture.jpg").convert("RGB")
pixels = processor.image_processor(image, return_tensors="pt")
tokens = processor.tokenizer(texts, padding="{processing.padding}", truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**pixels, {tokens}).logits_per_image{summand}
{PROBABILITIES[towers.use_bias]}"""


def _usage_of_composed(towers: TwoTowers, name: str, on_hub: bool) -> str:
    download = "from huggingface_hub import snapshot_download\n" if on_hub else ""
    folder = f'snapshot_download("{name}")' if on_hub else f'"{name}"'
    return f"""# in a checkout of the program that trained it
import torch
{download}from PIL import Image

from lib.towers.processing import Processing
from lib.towers import TwoTowers

folder = {folder}
towers, processing = TwoTowers.from_pretrained(folder), Processing.from_pretrained(folder)
texts, image = ["a photo of a cat", "a photo of a dog"], Image.open("picture.jpg").convert("RGB")
pixel_values = processing.image_processor()(image, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    output = towers(pixel_values, *processing.tokenize(texts))
logits = output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias
{PROBABILITIES[towers.use_bias]}"""


HUGGING_FACE = Format(lambda _: None, write, logits, usage, "transformers")  # any model has this format
