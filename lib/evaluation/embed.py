"""The embedding pass: every image and text of a data set through the towers once, divided among the ranks."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lib.data.batch import Tokenize
from lib.data.evaluation_set import EvaluationSet
from lib.data.images import BadImage, Extent
from lib.data.loading import PARTS_A_WORKER, start_worker, workers_that_fit
from lib.data.pipeline import ImagePipeline
from lib.distributed import gather_objects, gather_rows, rank_and_world_size
from lib.errors import InputError

OpenImage = Callable[[int, Extent], Image.Image]
"""An image by row, RGB and upright, at the extent or larger; raises BadImage."""


class Embedded(NamedTuple):
    """Embeddings of the images of a data set, and the images that could not be read."""

    embeds: Tensor
    """(n, D) float32 on the CPU, unit norm; rows of unread images hold zeros."""
    valid: Tensor
    """(n,) bool, false where the image could not be read."""
    skipped: list[tuple[str, str]]
    """(image key, reason) of the unread images, in their order."""


def embed_images(
    towers: nn.Module,
    images: EvaluationSet,
    pipeline: ImagePipeline,
    *,
    device: torch.device | str,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> Embedded:
    """Embed every image of the set; rank r embeds rows r, r + W, ... and all ranks return all rows.

    Unread images are listed. InputError if there are no images, none can be read, or an embedding is NaN.
    """
    count = len(images)
    if count == 0:
        raise InputError(f"{images.name} holds no images; point --data at a data set that does")
    rows = _rows_of_this_rank(count)
    loader = image_loader(images.open_image, pipeline, rows, device=device, batch_size=batch_size, workers=workers)
    pieces: list[Tensor] = []
    reasons: list[str] = []
    with evaluating(towers), _bar("images", len(rows), progress) as bar:
        for pixel_values, reasons_of_batch in loader:
            output = towers(pixel_values=pixel_values.to(device, non_blocking=True))
            pieces.append(output.image_embeds)
            reasons += reasons_of_batch
            bar.update(len(pixel_values))
    faults = {row: reason for row, reason in zip(rows, reasons, strict=True) if reason}
    faults = {row: reason for of_rank in gather_objects(faults) for row, reason in of_rank.items()}
    if len(faults) == count:
        raise InputError(
            f"none of the {count} images of {images.name} can be read ({counted(faults.values())}); check the files, "
            "or point --data at others"
        )
    bad = sorted(faults)
    valid = torch.ones(count, dtype=torch.bool)
    valid[bad] = False
    embeds = _gather(pieces, count).masked_fill(~valid[:, None], 0.0)
    require_finite(embeds, "image")
    return Embedded(embeds, valid, [(images.image_keys[row], faults[row]) for row in bad])


def embed_texts(
    towers: nn.Module,
    texts: Sequence[str],
    tokenize: Tokenize,
    *,
    device: torch.device | str,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Embed the texts, each distinct one once, divided among the ranks; all ranks return all rows.

    Returns (m, D) float32 on the CPU, unit norm. InputError if there are no texts or an embedding is NaN.
    """
    if len(texts) == 0:
        raise InputError("there are no texts to embed; point --data at a data set with captions or classes")
    # Texts of similar length share a batch, so little of it is padding.
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    mine = [distinct[row] for row in _rows_of_this_rank(len(distinct))]
    pieces = []
    with evaluating(towers), _bar("texts", len(mine), progress) as bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            input_ids, attention_mask = (tokens.to(device, non_blocking=True) for tokens in tokenize(batch))
            pieces.append(towers(input_ids=input_ids, attention_mask=attention_mask).text_embeds)
            bar.update(len(batch))
    embeds = _gather(pieces, len(distinct))
    require_finite(embeds, "text")
    row_of = {text: row for row, text in enumerate(distinct)}
    return embeds[[row_of[text] for text in texts]]


def require_finite(embeds: Tensor, kind: str) -> None:
    """Raise InputError if an embedding contains NaN or infinity: a ranking by it would be meaningless."""
    broken = int((~torch.isfinite(embeds).all(dim=1)).sum())
    if broken:
        raise InputError(
            f"{broken} of {len(embeds)} {kind} embeddings are NaN or infinite; "
            "the model's weights are damaged or its training diverged: evaluate an earlier checkpoint"
        )


def counted(reasons: Iterable[str]) -> str:
    """Reasons with their counts, the most frequent first: "truncated 3, empty 1"."""
    return ", ".join(f"{reason} {count:,}" for reason, count in Counter(reasons).most_common())


def image_loader(
    open_image: OpenImage,
    pipeline: ImagePipeline,
    rows: Sequence[int],
    *,
    device: torch.device | str,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of the given rows, in order: pixels uint8 (n, 3, H, W), and n reasons, empty for images that were read.

    As in training, workers send few images at a time and are fewer where there is little shared memory.
    """
    workers, part_size = workers_that_fit(workers, 3 * pipeline.size**2)
    loader = DataLoader(
        _Images(open_image, pipeline, rows),
        batch_size=min(part_size, batch_size),
        num_workers=workers,
        prefetch_factor=PARTS_A_WORKER if workers else None,
        worker_init_fn=start_worker,
        # A loader draws its seed from the global generator by default; a validation must not change that.
        generator=torch.Generator(),
    )
    pin = torch.device(device).type == "cuda"
    pixels, reasons = torch.empty(0, 3, pipeline.size, pipeline.size, dtype=torch.uint8), list[str]()
    # All ranks run equally many forwards, as FSDP needs: the batches do not depend on what the workers send.
    for piece, piece_reasons in loader:
        pixels, reasons = torch.cat([pixels, piece]), reasons + list(piece_reasons)
        while len(pixels) >= batch_size:
            yield _pinned(pixels[:batch_size], pin), reasons[:batch_size]
            pixels, reasons = pixels[batch_size:], reasons[batch_size:]
    if len(pixels):
        yield _pinned(pixels, pin), reasons


def _pinned(pixels: Tensor, wanted: bool) -> Tensor:
    return pixels.pin_memory() if wanted else pixels


class _Images(Dataset):
    """The given rows as (pixels uint8 (3, H, W), reason), the reason empty for images that were read."""

    def __init__(self, open_image: OpenImage, pipeline: ImagePipeline, rows: Sequence[int]):
        self.open_image, self.pipeline, self.rows = open_image, pipeline, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[Tensor, str]:
        row = self.rows[position]
        try:
            return self.pipeline.read(partial(self.open_image, row), seed=row), ""
        except BadImage as fault:
            # A blank image keeps the batch, and with it the number of forwards, equal on every rank.
            return torch.zeros(3, self.pipeline.size, self.pipeline.size, dtype=torch.uint8), fault.reason


@contextmanager
def evaluating(towers: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module returns to the mode it was in."""
    modes = [(module, module.training) for module in towers.modules()]
    towers.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _rows_of_this_rank(count: int) -> list[int]:
    """Rows rank, rank + W, ..., wrapped at the end, since FSDP needs equally many forwards on all ranks."""
    rank, world_size = rank_and_world_size()
    padded = -(-count // world_size) * world_size
    return [row % count for row in range(rank, padded, world_size)]


def _gather(pieces: list[Tensor], count: int) -> Tensor:
    """Rows of all ranks in the data set's order, without the wrapped ones: (count, D) float32 on the CPU."""
    _, world_size = rank_and_world_size()
    gathered = gather_rows(torch.cat(pieces).float())
    return rearrange(gathered, "(rank row) d -> (row rank) d", rank=world_size)[:count].cpu()


def _bar(kind: str, total: int, progress: bool) -> tqdm:
    rank, _ = rank_and_world_size()
    return tqdm(total=total, desc=f"embedding {kind}", disable=not progress or rank > 0, leave=False)
