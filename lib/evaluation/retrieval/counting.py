"""Counting, for every image and every caption at once, the wrong ones that are ranked before the right one.

One pass of blocks over the products of all images with all captions serves both directions. The products are float32,
which says "before" or "behind" for all but the few pairs that are as similar as the right one to within rounding;
those are computed again in float64. So ties are exact wherever two equal vectors stand in a matrix product.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lib.distributed import rank_and_world_size

SLAB = 255  # rows at a time: that many marks add up in a byte
BAND = 4 * SLAB  # rows of a thread: fewer make the products slower
COLUMNS = 8 * 255  # of a block, which stays in the cache; eight marks are added as one number, 255 of them in a row
SPARSE = 1 / 128  # part of a slab whose places are faster listed than compared again
DENSE = 1 / 64  # part of a block that may be computed again pair by pair
PAIRS = 4096  # computed again at a time


class Side(NamedTuple):
    """The images or the captions."""

    embeds: Tensor
    """(n, D) float32"""
    key: np.ndarray
    """(n,) int64, equal for what belongs together"""
    best: np.ndarray
    """(n,) float32, similarity of the best right answer; infinite where there is none"""

    def part(self, start: int, count: int) -> "Side":
        """Some of the rows."""
        rows = slice(start, start + count)
        return Side(self.embeds[rows], self.key[rows], self.best[rows])


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
    bands = [rows.part(top, BAND) for top in range(0, len(of_rows), BAND)]
    with _one_thread_a_product() as threads, ThreadPoolExecutor(threads) as pool:
        found = pool.map(partial(_count_band, columns, rounding), bands)
        others = rank_and_world_size()[0] > 0  # all ranks may count the same, as while training
        counted = tqdm(found, "ranks", len(bands), leave=False, delay=2, disable=others)
        for number, (of_band, of_all) in enumerate(counted):
            of_rows[number * BAND : (number + 1) * BAND] = of_band
            of_columns += of_all
    return of_rows, of_columns


@contextmanager
def _one_thread_a_product() -> Iterator[int]:
    """Products of one thread each, as many of which may run at once as torch had threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of the threads to come, too
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _count_band(columns: Side, rounding: float, band: Side) -> tuple[np.ndarray, np.ndarray]:
    """Counts of some rows, and what they add to those of all columns, block by block."""
    of_band, of_columns = np.zeros(len(band.key), np.int64), np.zeros(len(columns.key), np.int64)
    memory, marks = torch.empty(BAND * COLUMNS), np.empty((2, SLAB, COLUMNS), bool)
    for left in range(0, len(of_columns), COLUMNS):
        block_columns = columns.part(left, COLUMNS)
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
        of_band += _look_again(band, block_columns, np.concatenate(near_rows), 0)
        of_block += _look_again(band, block_columns, np.concatenate(near_columns), 1)
    return of_band, of_columns


def _count(
    slab: np.ndarray, best: np.ndarray, axis: int, rounding: float, marks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many of each row (axis 0) or column (1) are surely before the best; the places of what may be.

    marks (2, SLAB, COLUMNS) is memory to work in.
    """
    marks[:, :, slab.shape[1] :] = False
    sure, perhaps = (kind[: len(slab), : slab.shape[1]] for kind in marks)
    np.greater_equal(slab, best - rounding, out=perhaps)
    if np.count_nonzero(perhaps) < SPARSE * slab.size:  # as with a model that finds what it should
        places = np.flatnonzero(perhaps)
        number = np.divmod(places, slab.shape[1])[axis]
        surely = slab.reshape(-1)[places] > (best.reshape(-1) + rounding)[number]
        return np.bincount(number[surely], minlength=slab.shape[axis]), places[~surely]
    np.greater(slab, best + rounding, out=sure)
    near = np.flatnonzero(np.logical_xor(sure, perhaps, out=perhaps))
    if axis == 1:
        return np.add.reduce(sure.view(np.uint8), axis=0, dtype=np.uint8), near
    eights = np.add.reduce(marks[0, : len(slab)].view(np.uint64), axis=1, dtype=np.uint64)
    return np.add.reduce(eights.view(np.uint8).reshape(-1, 8), axis=1, dtype=np.int64), near


def _look_again(rows: Side, columns: Side, near: np.ndarray, axis: int) -> np.ndarray:
    """Counts by row (axis 0) or column (1) of the near places that are wrong and exactly as similar as the best."""
    places = np.divmod(near, len(columns.key))
    wrong = rows.key[places[0]] != columns.key[places[1]]
    row, column = (place[wrong] for place in places)
    side, place = ((rows, row), (columns, column))[axis]
    if len(row) > DENSE * len(rows.key) * len(columns.key):  # then one product of all is less work
        similarity = (rows.embeds.double() @ columns.embeds.double().T).float().numpy()[row, column]
    elif len(row):
        similarity = similarity_of_pairs(rows.embeds[row], columns.embeds[column]).numpy()
    else:
        similarity = np.zeros(0, np.float32)
    return np.bincount(place[similarity >= side.best[place]], minlength=len(side.key))


def rounding_of_products(rows: Tensor, columns: Tensor) -> float:
    """What a float32 product of a row (n, D) and a column (m, D) may be off by.

    Rounding errors of D steps are as good as random and grow with sqrt(D) (Higham and Mary, 2019); four times that
    is beyond the largest of 10^10 products.
    """
    unit = torch.finfo(torch.float32).eps / 2
    largest = rows.norm(dim=1).max() * columns.norm(dim=1).max()
    return 4 * sqrt(rows.shape[1]) * unit * float(largest)
