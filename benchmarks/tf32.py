"""Errors of TF32 in the losses: gradients with TF32-rounded inputs of the products, compared with float64.

python benchmarks/tf32.py [--size 8192] prints a table; it needs no GPU, because it rounds by itself: to 10 bits of the
mantissa, with sums in float32. Embeddings are random, or have a given cosine between matching pairs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import measured  # noqa: F401  (puts lib on the path)
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from lib.losses import Loss, LossShare, Pairs, infonce, sigmoid


@dataclass(frozen=True)
class Settings:
    """Sizes of the comparison."""

    size: int = 8192
    """Number of pairs."""
    dimension: int = 512
    """Dimensions of the embeddings."""
    scale: float = 100.0
    """Logit scale: the largest of CLIP."""
    noise: tuple[float, ...] = (0.0, 5.0, 3.0)
    """Weight of noise in a text, with its image of weight 1: the cosine is about 1 / sqrt(1 + noise^2); 0: random."""


def main(settings: Settings) -> None:
    print("| embeddings | loss | float32 | TF32 |\n|---|---|---|---|")
    for noise in settings.noise:
        images, texts = embeddings(settings, noise)
        kind = f"matching pairs at cosine {(images * texts).sum(1).mean():.2f}" if noise else "random"
        for name, loss, bias in (("InfoNCE", infonce, 0.0), ("sigmoid", sigmoid, -20.0)):
            exact = gradients(loss, images, texts, settings.scale, bias)
            short = gradients(loss, images.float(), texts.float(), settings.scale, bias)
            with tf32():
                rounded = gradients(loss, images.float(), texts.float(), settings.scale, bias)
            print(f"| {kind} | {name} | {off(short, exact):.1e} | {off(rounded, exact):.1e} |", flush=True)


def embeddings(settings: Settings, noise: float) -> tuple[Tensor, Tensor]:
    """Embeddings of both towers, (N, D), unit norm, float64."""
    generator = torch.Generator().manual_seed(0)
    shape = settings.size, settings.dimension
    images, others = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return F.normalize(images, dim=1), F.normalize(images + noise * others if noise else others, dim=1)


def gradients(loss: Loss, images: Tensor, texts: Tensor, scale: float, bias: float) -> LossShare:
    """The loss and its gradients; every pair is its own group."""
    ids = torch.arange(len(images))
    numbers = (torch.tensor(number, dtype=images.dtype) for number in (scale, bias))
    return loss(Pairs(images, texts, ids, ids, ids), None, *numbers, slice(0, len(images)))


def off(found: LossShare, exact: LossShare) -> float:
    """Relative error of the image embeddings' gradient, by its norm."""
    difference = found.image_embeds.double() - exact.image_embeds
    return (difference.norm() / exact.image_embeds.norm()).item()


@contextmanager
def tf32() -> Iterator[None]:
    """Round the inputs of the losses' matrix products."""
    mm, addmm = torch.mm, torch.Tensor.addmm_
    torch.mm = lambda left, right, out: mm(rounded(left), rounded(right), out=out)
    torch.Tensor.addmm_ = lambda total, left, right, **factors: addmm(total, rounded(left), rounded(right), **factors)
    try:
        yield
    finally:
        torch.mm, torch.Tensor.addmm_ = mm, addmm


def rounded(tensor: Tensor) -> Tensor:
    """Round float32 to 10 bits of mantissa."""
    bits = tensor.contiguous().view(torch.int32)
    return (bits + 0x1000).bitwise_and_(~0x1FFF).view(torch.float32)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
