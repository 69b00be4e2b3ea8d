"""Ranks of the right answers in retrieval, and their summary.

One pass over blocks of all image-caption products serves both directions. The products are float32, which decides
"before" or "behind" for all but the few pairs whose similarity equals that of the right answer to within rounding;
those are computed again in float64. Ties are therefore exact, wherever two equal vectors stand in a matrix product.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lib.distributed import rank_and_world_size
from lib.errors import InputError
from lib.evaluation.embed import require_finite

RECALL_AT = (1, 5, 10)
SLAB = 255  # rows at a time: that many marks add up in a byte
BAND = 4 * SLAB  # rows of a thread: fewer make the products slower
COLUMNS = 8 * 255  # of a block, which stays in the cache; eight marks are added as one number, 255 of them in a row
SPARSE = 1 / 128  # below this share of a slab, listing the places is faster than comparing all again
DENSE = 1 / 64  # up to this share of a block, pairs are computed again one by one
PAIRS = 4096  # computed again at a time


def retrieval_metrics(
    image_embeds: Tensor, text_embeds: Tensor, caption_image: Tensor | np.ndarray
) -> dict[str, dict[str, float]]:
    """Recall@1/5/10, mean reciprocal rank and median rank in both directions.

    image_embeds: (n, D); text_embeds: (m, D); caption_image: (m,) the image each caption belongs to.
    An image counts by its best-ranked own caption; images without captions are candidates only.
    """
    return summarize_both(*retrieval_ranks(image_embeds, text_embeds, caption_image))


def summarize_both(to_text: Tensor, to_image: Tensor) -> dict[str, dict[str, float]]:
    """Figures of both directions, of ranks as `retrieval_ranks` returns them."""
    return {"image_to_text": summarize_ranks(to_text), "text_to_image": summarize_ranks(to_image)}


def retrieval_ranks(
    image_embeds: Tensor, text_embeds: Tensor, caption_image: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Ranks, from 1: of the first own caption of each image that has one, and of the image of each caption.

    A rank is 1 + the number of wrong candidates at least as similar. Ties count against the model, which must not
    succeed by giving everything the same embedding. Returns int64 (images with captions,), in the order of the images,
    and (m,).
    """
    require_finite(image_embeds, "image")
    require_finite(text_embeds, "text")
    caption_image = torch.as_tensor(caption_image)
    if len(caption_image) == 0:
        raise InputError("no caption of the data set has a readable image; retrieval needs at least one")
    own = similarity_of_pairs(image_embeds[caption_image], text_embeds)
    best = torch.full((len(image_embeds),), torch.inf).scatter_reduce(0, caption_image, own, "amax", include_self=False)
    images = Side(image_embeds.float(), np.arange(len(image_embeds)), best.numpy())
    captions = Side(text_embeds.float(), caption_image.numpy(), own.numpy())
    before_image, before_caption = count_before(images, captions)
    return torch.from_numpy(1 + before_image)[caption_image.unique()], torch.from_numpy(1 + before_caption)


def keep_readable(valid: Tensor, caption_image: Tensor | np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Leave unread images and their captions out.

    valid: (n,) bool. Returns the kept images (k,), the kept captions (c,), both as row numbers, and the image
    of each kept caption, numbered among the kept images (c,).
    """
    caption_image = torch.as_tensor(caption_image)
    captions = valid[caption_image].nonzero().flatten()
    renumbered = valid.cumsum(0) - 1
    return valid.nonzero().flatten(), captions, renumbered[caption_image[captions]]


def summarize_ranks(ranks: Tensor) -> dict[str, float]:
    """Fractions ranked within the first 1, 5 and 10, the mean reciprocal rank and the median rank."""
    summary = {f"R@{k}": (ranks <= k).sum().item() / len(ranks) for k in RECALL_AT}
    # Summed exactly, so that the order of the queries does not matter.
    summary["MRR"] = math.fsum(1.0 / rank for rank in ranks.tolist()) / len(ranks)
    summary["median_rank"] = float(np.median(ranks.numpy()))
    return summary


class Side(NamedTuple):
    """The images or the captions."""

    embeds: Tensor
    """(n, D) float32"""
    key: np.ndarray
    """(n,) int64, equal for an image and its captions"""
    best: np.ndarray
    """(n,) float32, similarity of the best right answer; infinite where there is none"""

    def rows(self, start: int, count: int) -> "Side":
        """`count` rows from `start` on."""
        kept = slice(start, start + count)
        return Side(self.embeds[kept], self.key[kept], self.best[kept])


def similarity_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Row by row products of (P, D) and (P, D), in float64 rounded to float32: equal vectors give equal numbers."""
    blocks = zip(first.split(PAIRS), second.split(PAIRS), strict=True)
    return torch.cat([(one.double() * other.double()).sum(dim=1) for one, other in blocks]).float()


def count_before(rows: Side, columns: Side) -> tuple[np.ndarray, np.ndarray]:
    """How many wrong answers are at least as similar as the best right one, for each row and for each column.

    Returns (n,) and (m,) int64. Every thread holds a block of similarities at a time.
    """
    of_rows, of_columns = np.zeros(len(rows.key), np.int64), np.zeros(len(columns.key), np.int64)
    rounding = rounding_of_products(rows.embeds, columns.embeds)
    bands = [rows.rows(top, BAND) for top in range(0, len(of_rows), BAND)]
    with _one_thread_a_product() as threads, ThreadPoolExecutor(threads) as pool:
        found = pool.map(partial(_count_band, columns, rounding), bands)
        others = rank_and_world_size()[0] > 0  # during training all ranks count the same
        counted = tqdm(found, "ranks", len(bands), leave=False, delay=2, disable=others)
        for number, (of_band, of_all) in enumerate(counted):
            of_rows[number * BAND : (number + 1) * BAND] = of_band
            of_columns += of_all
    return of_rows, of_columns


@contextmanager
def _one_thread_a_product() -> Iterator[int]:
    """Limit each product to one thread; yields how many threads torch had, to run that many products at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # also for threads that start later
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _count_band(columns: Side, rounding: float, band: Side) -> tuple[np.ndarray, np.ndarray]:
    """Counts of some rows, and their share of the counts of all columns, block by block."""
    of_band, of_columns = np.zeros(len(band.key), np.int64), np.zeros(len(columns.key), np.int64)
    memory, marks = torch.empty(BAND * COLUMNS), np.empty((2, SLAB, COLUMNS), bool)
    for left in range(0, len(of_columns), COLUMNS):
        block_columns = columns.rows(left, COLUMNS)
        of_block = of_columns[left : left + COLUMNS]
        block = memory[: len(of_band) * len(of_block)].view(len(of_band), len(of_block))
        torch.mm(band.embeds, block_columns.embeds.T, out=block)
        near_rows, near_columns = [], []
        for top in range(0, len(of_band), SLAB):
            slab, place = block[top : top + SLAB].numpy(), top * len(of_block)
            counts, near = _count(slab, band.best[top : top + SLAB, None], 0, rounding, marks)
            of_band[top : top + SLAB] += counts
            near_rows.append(place + near)
            counts, near = _count(slab, block_columns.best, 1, rounding, marks)
            of_block += counts
            near_columns.append(place + near)
        of_band += _count_exactly(band, block_columns, np.concatenate(near_rows), 0)
        of_block += _count_exactly(band, block_columns, np.concatenate(near_columns), 1)
    return of_band, of_columns


def _count(
    slab: np.ndarray, best: np.ndarray, axis: int, rounding: float, marks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many of each row (axis 0) or column (1) are certainly before the best, and the places that rounding decides.

    marks: (2, SLAB, COLUMNS), memory to work in.
    """
    marks[:, :, slab.shape[1] :] = False
    sure, perhaps = (kind[: len(slab), : slab.shape[1]] for kind in marks)
    np.greater_equal(slab, best - rounding, out=perhaps)
    if np.count_nonzero(perhaps) < SPARSE * slab.size:  # usual for a good model
        places = np.flatnonzero(perhaps)
        number = np.divmod(places, slab.shape[1])[axis]
        surely = slab.reshape(-1)[places] > (best.reshape(-1) + rounding)[number]
        return np.bincount(number[surely], minlength=slab.shape[axis]), places[~surely]
    np.greater(slab, best + rounding, out=sure)
    near = np.flatnonzero(np.logical_xor(sure, perhaps, out=perhaps))
    if axis == 1:
        return np.add.reduce(sure.view(np.uint8), axis=0, dtype=np.uint8), near
    # Eight marks are bytes of one uint64, so that one addition counts all of them; 255 additions fit into a byte.
    eights = np.add.reduce(marks[0, : len(slab)].view(np.uint64), axis=1, dtype=np.uint64)
    return np.add.reduce(eights.view(np.uint8).reshape(-1, 8), axis=1, dtype=np.int64), near


def _count_exactly(rows: Side, columns: Side, near: np.ndarray, axis: int) -> np.ndarray:
    """Counts by row (axis 0) or column (1) of the near places that are wrong and exactly as similar as the best."""
    places = np.divmod(near, len(columns.key))
    wrong = rows.key[places[0]] != columns.key[places[1]]
    row, column = (place[wrong] for place in places)
    side, place = ((rows, row), (columns, column))[axis]
    if len(row) > DENSE * len(rows.key) * len(columns.key):  # one product of the whole block is faster
        similarity = (rows.embeds.double() @ columns.embeds.double().T).float().numpy()[row, column]
    elif len(row):
        similarity = similarity_of_pairs(rows.embeds[row], columns.embeds[column]).numpy()
    else:
        similarity = np.zeros(0, np.float32)
    return np.bincount(place[similarity >= side.best[place]], minlength=len(side.key))


def rounding_of_products(rows: Tensor, columns: Tensor) -> float:
    """Largest rounding error of a float32 product of a row (n, D) and a column (m, D).

    Rounding errors of D steps behave as if random and grow with sqrt(D) (Higham and Mary, 2019); four times that
    exceeds the largest of 10^10 products.
    """
    unit = torch.finfo(torch.float32).eps / 2
    largest = rows.norm(dim=1).max() * columns.norm(dim=1).max()
    return 4 * math.sqrt(rows.shape[1]) * unit * float(largest)
