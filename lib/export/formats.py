"""Parts that all formats of an export share: their functions, and the pairs that every export is checked with."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from lib.errors import InputError, RunError, raised_as
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


@dataclass(frozen=True)
class Sample:
    """A few pairs, such as a chunk of the training data: uint8 pixels (n, 3, H, W) and tokens (n, L)."""

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Format:
    """Functions that write a model in one format and load it again."""

    check: Callable[[TwoTowers], None]
    """Raise InputError where a package is missing, or the format does not fit this model."""
    write: Callable[[TwoTowers, Processing, Path], None]
    """Write the files into an empty folder."""
    logits: Callable[[TwoTowers, Processing, Path, Sample], Tensor]
    """Load the folder as its users do: (n, n) logits. The towers only add numbers that files have no place for."""
    usage: Callable[[TwoTowers, Processing, str, bool], str]
    """Python that loads the files and computes logits, by the name of a local folder or (True) of a hub repository."""
    library: str
    """The hub's name of the library that loads it."""


def importing(name: str, packages: str) -> AbstractContextManager[None]:
    """A context for imports: where one fails, InputError tells how to install the packages of the format `name`."""
    return raised_as(
        lambda fault: InputError(
            f"--format {name} writes and checks its files with packages that cannot be imported ({fault}): "
            f"pip install {packages}"
        ),
        ImportError,
    )


def noise_and_texts(processing: Processing, texts: Sequence[str] = TEXTS, seed: int = 0) -> Sample:
    """Noise as images, with texts: enough to tell one model from another."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(texts), 3, processing.image_size, processing.image_size)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Sample(pixels, *processing.tokenize(list(texts)))


def check_tokens(tokenize: Callable[[list[str]], Tensor], processing: Processing) -> None:
    """Raise RunError where another library's tokenizer reads `TEXTS` as other tokens than training did.

    tokenize: returns input_ids (n, L); of longer rows than ours only the beginnings are compared.
    """
    expected = processing.tokenize(list(TEXTS))[0]
    if not torch.equal(tokenize(list(TEXTS)).cpu()[:, : expected.shape[1]], expected):
        raise RunError("the exported tokenizer gives other tokens than the model was trained with; nothing was written")


def normalized(processor: BaseImageProcessor, processing: Processing, sample: Sample, tensors: str) -> BatchFeature:
    """The sample's pixels, which have the model's size already, normalized by an exported image processor.

    tensors: pt or np.
    """
    pixels = sample.pixel_values.cpu()
    if processing.resize.channels == "bgr":  # the processor turns the order of the channels
        pixels = pixels.flip(1)
    return processor(list(pixels), do_resize=False, do_center_crop=False, return_tensors=tensors)


@torch.no_grad()
def expected_logits(towers: TwoTowers, sample: Sample) -> Tensor:
    """The sample's logits (n, n) that every export must give: of the towers in eval mode, on the CPU."""
    device, training = towers.logit_scale.device, towers.training
    towers.eval()
    tensors = (sample.pixel_values, sample.input_ids, sample.attention_mask)
    output = towers(*(tensor.to(device) for tensor in tensors))
    towers.train(training)
    return (output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias).cpu()
