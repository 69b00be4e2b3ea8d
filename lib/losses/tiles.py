"""Logits of some anchors against some others, visited in tiles, and the gradients that gather over them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TILE = 1024  # rows and columns of a block of logits on a CPU: with its spare, what a core's share of the cache holds
ACCELERATOR_TILE = 4096  # fewer and longer kernels: launching one costs as much as a small tile

TileSlope = Callable[[slice, slice, Tensor, Tensor], Tensor]
"""(rows, columns, tile of logits, spare of its shape) -> the tile's d loss / d logits; it may overwrite both."""
TileMask = Callable[[slice, slice], Tensor]
"""(rows, columns) -> bool of the tile's shape: what does not count."""


def tile_side(device: torch.device) -> int:
    """Rows and columns of a tile on this device."""
    return TILE if device.type == "cpu" else ACCELERATOR_TILE


def wide_type(device: torch.device) -> torch.dtype:
    """The type in which sums over all pairs accumulate: in float32 a loss of N^2 terms would keep three digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide_sum(matrix: Tensor) -> Tensor:
    """Sum of all elements as a `wide_type`: (). A row adds up in its own type, since a wide copy would cost more."""
    return matrix.sum(1).sum(dtype=wide_type(matrix.device))


class TileBuffers:
    """Two tiles of so many rows and columns, which all blocks of one loss share: each visits its tiles alone."""

    def __init__(self, side: int) -> None:
        self.side = side
        self._memory: Tensor | None = None

    def of_shape(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors (rows, columns) in that memory; what they held is lost."""
        size = rows * columns
        if self._memory is None or self._memory.shape[1] < size:
            self._memory = like.new_empty(2, size)
        logits, spare = self._memory[:, :size]
        return logits.view(rows, columns), spare.view(rows, columns)


class LogitTiles:
    """scale * anchors others^T + bias (None: no bias), of anchors (A, D) and others (M, D), never held as a whole.

    What is left out is -inf. Every tile is written into the same two buffers: fresh memory for each would cost more
    than the arithmetic in it.
    """

    def __init__(
        self,
        anchors: Tensor,
        others: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        buffers: TileBuffers,
        left_out: TileMask | None = None,
    ) -> None:
        self.anchors, self.others, self.scale, self.bias = anchors, others, scale, bias
        self.side, self._buffers, self._left_out = buffers.side, buffers, left_out

    def add_logsumexp(self, of_anchors: Tensor, of_others: Tensor | None = None) -> None:
        """Merge the logits into the log-sum-exp of each anchor (A,) and, where given, of each other (M,), in place."""
        for r in _slices(len(self.anchors), self.side):
            for c, logits, spare in self._row_of_tiles(r, self.anchors[r] * self.scale):
                of_anchors[r] = torch.logaddexp(of_anchors[r], _logsumexp(logits, 1, spare))
                if of_others is not None:
                    of_others[c] = torch.logaddexp(of_others[c], _logsumexp(logits, 0, spare))

    def softmax_mean(self) -> tuple[Tensor, Tensor]:
        """Each anchor's log-sum-exp (A,), and the others' mean by its softmax (A, D), in one visit of the tiles.

        -inf and 0 where all is left out. What was summed is scaled down as larger logits turn up.
        Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
        """
        lse, means = self.anchors.new_empty(len(self.anchors)), torch.empty_like(self.anchors)
        for r in _slices(len(self.anchors), self.side):
            largest = torch.full_like(means[r, :1], torch.finfo(means.dtype).min)
            total, sums = torch.zeros_like(largest), means[r].zero_()
            for c, logits, _ in self._row_of_tiles(r, self.anchors[r] * self.scale):
                before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
                shrunk, weights = (before - largest).exp_(), logits.sub_(largest).exp_()
                total.mul_(shrunk).add_(weights.sum(1, keepdim=True))
                sums.mul_(shrunk).addmm_(weights, self.others[c])
            lse[r] = total.log().add_(largest)[:, 0]
            sums.div_(total.clamp_(min=torch.finfo(total.dtype).tiny))
        return lse, means

    def add_gradients(self, slope: TileSlope, d_anchors: Tensor, d_others: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add to d_anchors (A, D) and d_others (M, D) what all tiles' slopes give; return those of scale and bias."""
        d_scale, d_bias = (torch.zeros((), dtype=wide_type(self.scale.device), device=self.scale.device) for _ in "ab")
        for r in _slices(len(self.anchors), self.side):
            anchors = self.anchors[r]
            scaled = anchors * self.scale
            of_dots = torch.zeros_like(anchors)  # sum over columns of (d loss / d logits) * other embedding
            for c, logits, spare in self._row_of_tiles(r, scaled):
                slopes = slope(r, c, logits, spare)
                if self.bias is not None:
                    d_bias += wide_sum(slopes)
                of_dots.addmm_(slopes, self.others[c])
                if d_others is not None:
                    d_others[c].addmm_(slopes.T, scaled)
            d_scale += wide_sum(of_dots * anchors)  # <slopes, anchors others^T>, without that matrix
            d_anchors[r].addcmul_(of_dots, self.scale)
        return d_scale, d_bias

    def _row_of_tiles(self, r: slice, scaled: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(columns, logits, spare) of every tile of these rows."""
        for c in _slices(len(self.others), self.side):
            others = self.others[c]
            logits, spare = self._buffers.of_shape(len(scaled), len(others), like=scaled)
            torch.mm(scaled, others.T, out=logits)
            if self.bias is not None:
                logits.add_(self.bias)
            if self._left_out is not None:
                logits.masked_fill_(self._left_out(r, c), -torch.inf)
            yield c, logits, spare


def _logsumexp(logits: Tensor, over: int, spare: Tensor) -> Tensor:
    """torch.logsumexp without new memory; where all is -inf, -inf."""
    largest = logits.amax(over, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    return torch.sub(logits, largest, out=spare).exp_().sum(over).log_().add_(largest.squeeze(over))


def _slices(length: int, side: int) -> Iterator[slice]:
    return (slice(start, min(start + side, length)) for start in range(0, length, side))
