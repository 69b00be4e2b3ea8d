"""Common parts of all forms of export: the pairs that they are checked with, and the last line of their examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from lib.errors import RunError
from lib.towers import TwoTowers
from lib.towers.processing import Processing

# Of different lengths, so that padding is part of the check.
TEXTS = (
    "a photo of a cat",
    "two dogs run through the snow, one of them with a stick",
    "a red square",
    "the digit seven, written by hand",
    "a man in a blue shirt is repairing the wheel of a bicycle",
    "Somebody is cooking!",
    "an aerial view of a harbour with 12 boats",
    "music",
)

# Without a bias, trained with the softmax; with one, with the sigmoid.
PROBABILITIES = {False: "probabilities = logits.softmax(-1)", True: "probabilities = logits.sigmoid()"}


class Sample(Protocol):
    """A few pairs, such as a chunk of the training data: uint8 pixels (n, 3, H, W) and tokens (n, L)."""

    @property
    def pixel_values(self) -> Tensor: ...
    @property
    def input_ids(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor: ...


@dataclass(frozen=True)
class Pairs:
    """A `Sample` of its own."""

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor


def noise_and_texts(processing: Processing, texts: Sequence[str] = TEXTS, seed: int = 0) -> Pairs:
    """Noise as images, with texts: enough to tell one model from another."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(texts), 3, processing.image_size, processing.image_size)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Pairs(pixels, *processing.tokenize(list(texts)))


def check_tokens(tokenize: Callable[[list[str]], Tensor], processing: Processing) -> None:
    """Raise RunError where another library's tokenizer reads `TEXTS` as other tokens than training did.

    tokenize: gives input_ids (n, L); of longer rows than ours only the beginnings are compared.
    """
    expected = processing.tokenize(list(TEXTS))[0]
    if not torch.equal(tokenize(list(TEXTS)).cpu()[:, : expected.shape[1]], expected):
        raise RunError("the exported tokenizer gives other tokens than the model was trained with; nothing was written")


def normalized(processor: BaseImageProcessor, processing: Processing, sample: Sample, tensors: str) -> BatchFeature:
    """The sample's pixels as an exported image processor normalizes them: they have the model's size already.

    tensors: pt or np.
    """
    pixels = sample.pixel_values.cpu()
    if processing.resize.channels == "bgr":  # the order that the processor turns them to
        pixels = pixels.flip(1)
    return processor(list(pixels), do_resize=False, do_center_crop=False, return_tensors=tensors)


@torch.no_grad()
def expected_logits(towers: TwoTowers, sample: Sample) -> Tensor:
    """What every export has to give for the sample: (n, n) logits of the towers in eval mode, on the CPU."""
    device, training = towers.logit_scale.device, towers.training
    towers.eval()
    tensors = (sample.pixel_values, sample.input_ids, sample.attention_mask)
    output = towers(*(tensor.to(device) for tensor in tensors))
    towers.train(training)
    return (output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias).cpu()
