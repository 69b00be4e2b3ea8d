"""The ONNX format: image.onnx and text.onnx, each a whole tower that returns unit-norm embeddings.

image.onnx takes normalized float pixels (n, 3, H, W), text.onnx input_ids and, unless the model is a SigLIP,
attention_mask, both (n, L) int64; n and L are free. Scale and bias of the logits are in export.json.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from lib.errors import RunError
from lib.export.formats import TEXTS, Format, Sample, importing, normalized
from lib.towers import TwoTowers
from lib.towers.model_files import NO_CODE
from lib.towers.processing import Processing

LARGEST_FILE = 2**31 - 2**20  # protobuf's limit of 2 GiB; the weights of more are a file of their own
# As in the other formats, without torch.
PROBABILITIES = {
    False: "probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()",
    True: "probabilities = 1 / (1 + np.exp(-logits))",
}
BATCHES = (1, 3)  # sizes of the first batches of the check; the rest of the sample is the last


class _Encoder(nn.Module):
    def __init__(self, towers: TwoTowers) -> None:
        super().__init__()
        self.towers = towers


class _ImageEncoder(_Encoder):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.towers(pixel_values=pixel_values).image_embeds


class _TextEncoder(_Encoder):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.towers(input_ids=input_ids, attention_mask=attention_mask).text_embeds


def check(towers: TwoTowers) -> None:
    """Raise InputError where a package is missing; towers of any kind can be tried."""
    with importing("onnx", "onnx onnxruntime onnxscript"):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401


def write(towers: TwoTowers, processing: Processing, folder: Path) -> None:
    """Write both towers, which are on the CPU in float32, the tokenizer and the image processor."""
    training = towers.training
    towers.eval()
    side = processing.image_size
    pixels = torch.zeros(2, 3, side, side)
    _convert(_ImageEncoder(towers), {"pixel_values": pixels}, "image_embeds", folder / "image.onnx")
    input_ids, attention_mask = processing.tokenize(list(TEXTS[:2]))
    tokens = {"input_ids": input_ids} | ({"attention_mask": attention_mask} if towers.text.masked else {})
    _convert(_TextEncoder(towers), tokens, "text_embeds", folder / "text.onnx")
    towers.train(training)
    processing.tokenizer.save_pretrained(folder)
    # The graph cuts images into patches itself, where the model takes patches.
    replace(processing, patch_size=None).image_processor().save_pretrained(folder)


def _convert(encoder: nn.Module, inputs: dict[str, Tensor], output_name: str, file: Path) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in encoder.parameters())
    free = {name: {0: "batch"} | ({1: "length"} if value.ndim == 2 else {}) for name, value in inputs.items()}
    try:
        with _silent():
            torch.onnx.export(
                encoder.eval(),
                kwargs=inputs,
                f=file,
                input_names=list(inputs),
                output_names=[output_name],
                dynamic_shapes=free,
                dynamo=True,
                external_data=size > LARGEST_FILE,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise RunError(
            f"--format onnx: torch cannot convert the tower of {file.name} ({reason}); use --format hf"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the notes of torch and onnxscript on their own internals."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def logits(towers: TwoTowers, processing: Processing, folder: Path, sample: Sample) -> Tensor:
    """Through onnxruntime, in batches of several sizes, and texts of several lengths."""
    import onnxruntime

    image_tower, text_tower = (
        onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        for name in ("image.onnx", "text.onnx")
    )
    images = normalized(AutoImageProcessor.from_pretrained(folder, **NO_CODE), processing, sample, "np")
    image_embeds, text_embeds = [], []
    for rows in np.split(np.arange(len(sample.input_ids)), np.cumsum(BATCHES)):
        if not len(rows):
            continue
        image_embeds += image_tower.run(None, {"pixel_values": images["pixel_values"][rows]})
        # The last one or two columns of a short batch may be padding alone: without them it has another length.
        longest = int(sample.attention_mask[rows].sum(1).max()) if towers.text.masked else None
        tokens = {"input_ids": sample.input_ids, "attention_mask": sample.attention_mask}
        wanted = {i.name: tokens[i.name][rows, :longest].cpu().numpy() for i in text_tower.get_inputs()}
        text_embeds += text_tower.run(None, wanted)
    image_rows, text_rows = (torch.from_numpy(np.concatenate(embeds)) for embeds in (image_embeds, text_embeds))
    return towers.logit_scale.exp().item() * image_rows @ text_rows.T + towers.logit_bias.item()


def usage(towers: TwoTowers, processing: Processing, name: str, on_hub: bool) -> str:
    download = "from huggingface_hub import snapshot_download\n" if on_hub else ""
    folder = f'snapshot_download("{name}")' if on_hub else f'"{name}"'
    return f"""import json

import numpy as np
import onnxruntime
{download}from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

folder = {folder}
image_tower = onnxruntime.InferenceSession(f"{{folder}}/image.onnx")
text_tower = onnxruntime.InferenceSession(f"{{folder}}/text.onnx")
tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
texts, image = ["a photo of a cat", "a photo of a dog"], Image.open("picture.jpg").convert("RGB")
pixels = processor(image, return_tensors="np")["pixel_values"]
tokens = tokenizer(texts, padding="{processing.padding}", truncation=True, return_tensors="np")
(image_embeds,) = image_tower.run(None, {{"pixel_values": pixels}})
(text_embeds,) = text_tower.run(None, {{given.name: tokens[given.name] for given in text_tower.get_inputs()}})
numbers = json.load(open(f"{{folder}}/export.json"))
logits = numbers["logit_scale"] * image_embeds @ text_embeds.T + numbers["logit_bias"]
{PROBABILITIES[towers.use_bias]}"""


ONNX = Format(check, write, logits, usage, "onnx")
