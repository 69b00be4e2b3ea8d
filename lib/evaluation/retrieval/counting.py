"""Counting, for every image and every caption at once, the wrong ones that are ranked before the right one.

One pass of blocks over the products of all images with all captions serves both directions. The products are float32,
which says "before" or "behind" for all but the few pairs that are as similar as the right one to within rounding;
those are computed again in float64. So ties are exact wherever two equal vectors stand in a matrix product.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SLAB = 255  # rows at a time of a thread: that many marks add up in a byte
SLABS = 4  # of a block at least: fewer rows make the products slower
COLUMNS = 8192  # of a block
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
        return Side(*(values[start : start + count] for values in self))


class _Counts(NamedTuple):
    """What a slab says: how many are surely before the best of a row or column, and the places of those that may be."""

    of_rows: np.ndarray
    of_columns: np.ndarray
    near_rows: np.ndarray
    near_columns: np.ndarray


def similarity_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Row by row products of (P, D) and (P, D), in float64 rounded to float32: equal vectors give equal numbers."""
    blocks = zip(first.split(PAIRS), second.split(PAIRS), strict=True)
    return torch.cat([(one.double() * other.double()).sum(dim=1) for one, other in blocks]).float()


def count_before(rows: Side, columns: Side) -> tuple[np.ndarray, np.ndarray]:
    """How many wrong answers are at least as similar as the best right one, for each row and for each column.

    Returns (n,) and (m,) int64. Holds a block of similarities at a time.
    """
    of_rows, of_columns = np.zeros(len(rows.key), np.int64), np.zeros(len(columns.key), np.int64)
    rounding, threads = rounding_of_products(rows.embeds, columns.embeds), torch.get_num_threads()
    height = SLAB * max(threads, SLABS)
    size = min(height, len(of_rows)) * min(COLUMNS, len(of_columns))
    buffer, marks = torch.empty(size), np.empty((2, size), bool)
    with ThreadPoolExecutor(threads) as pool:
        for top in range(0, len(of_rows), height):
            some_rows = rows.part(top, height)
            for left in range(0, len(of_columns), COLUMNS):
                some_columns = columns.part(left, COLUMNS)
                shape = len(some_rows.key), len(some_columns.key)
                block = buffer[: shape[0] * shape[1]].view(shape)
                torch.mm(some_rows.embeds, some_columns.embeds.T, out=block)
                work = partial(_count_slab, some_rows, some_columns, rounding, block.numpy(), marks)
                slabs = list(pool.map(work, range(0, shape[0], SLAB)))  # NumPy lets the threads run side by side
                of_rows[top : top + height] += np.concatenate([slab.of_rows for slab in slabs])
                of_columns[left : left + COLUMNS] += np.sum([slab.of_columns for slab in slabs], axis=0)
                near = np.concatenate([slab.near_rows for slab in slabs])
                of_rows[top : top + height] += _look_again(some_rows, some_columns, near, 0)
                near = np.concatenate([slab.near_columns for slab in slabs])
                of_columns[left : left + COLUMNS] += _look_again(some_rows, some_columns, near, 1)
    return of_rows, of_columns


def _count_slab(
    rows: Side, columns: Side, rounding: float, block: np.ndarray, marks: np.ndarray, start: int
) -> _Counts:
    """Count in the rows from `start` on; marks (2, at least the block's size) are memory to work in."""
    slab = block[start : start + SLAB]
    place = start * block.shape[1]
    own_marks = [kind[place : place + slab.size].reshape(slab.shape) for kind in marks]
    of_rows, near_rows = _count(slab, rows.best[start : start + SLAB, None], 0, rounding, own_marks)
    of_columns, near_columns = _count(slab, columns.best, 1, rounding, own_marks)
    return _Counts(of_rows, of_columns, place + near_rows, place + near_columns)


def _count(
    slab: np.ndarray, best: np.ndarray, axis: int, rounding: float, marks: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """How many of each row (axis 0) or column (1) are surely before the best; the places of what may be."""
    sure, perhaps = marks
    np.greater_equal(slab, best - rounding, out=perhaps)
    if np.count_nonzero(perhaps) < SPARSE * slab.size:  # as with a model that finds what it should
        places = np.flatnonzero(perhaps)
        number = np.divmod(places, slab.shape[1])[axis]
        surely = slab.reshape(-1)[places] > (best.reshape(-1) + rounding)[number]
        return np.bincount(number[surely], minlength=slab.shape[axis]), places[~surely]
    np.greater(slab, best + rounding, out=sure)
    near = np.flatnonzero(np.logical_xor(sure, perhaps, out=perhaps))
    if axis == 0:
        return np.fromiter(map(np.count_nonzero, sure), np.int64, len(sure)), near
    return np.add.reduce(sure.view(np.uint8), axis=0, dtype=np.uint8).astype(np.int64), near


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
