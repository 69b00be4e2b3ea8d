"""BatchPlan: N, B, C, Q, W of a run, the memory that they need, and the words that tell the user so."""

from dataclasses import dataclass
from math import ceil, log2

from lib.losses.tiles import TILE

MOST_RECURRENCES = 8  # of a pair, above which a batch or a memory is not merely large but out of place


@dataclass(frozen=True)
class BatchPlan:
    """The numbers of one optimizer step; letters as in the README. Bytes are those of one rank."""

    effective_batch: int
    """N"""
    world_size: int
    """W"""
    chunk_size: int
    """C, the most pairs of a forward"""
    keep_graphs: int
    xbm_size: int
    """Q"""
    embed_dim: int
    """D"""
    image_bytes: int
    """Bytes of one image as it comes from the data."""
    graph_bytes: int
    """Activations that autograd keeps of one chunk."""
    chunk_bytes: int
    """Peak of one chunk's forward and backward, its inputs included."""
    state_bytes: int
    """Weights, gradients and optimizer state."""
    tile: int = TILE
    """Rows and columns of the logits that the loss holds at a time."""
    chunks_ahead: int = 0
    """Chunks of the next step that the host reads meanwhile."""

    @property
    def per_rank(self) -> int:
        """B"""
        return self.effective_batch // self.world_size

    @property
    def chunks(self) -> int:
        """K: chunks of one rank in a step."""
        return ceil(self.per_rank / self.chunk_size)

    @property
    def chunk_pairs(self) -> int:
        """Pairs in the largest chunk: the K chunks are as equal as can be."""
        return largest_part(self.per_rank, self.chunk_size)

    @property
    def embedding_bytes(self) -> int:
        """Fresh embeddings of both towers, their gradients and sums over groups, the memory, and the loss's tiles."""
        return embedding_bytes(self.effective_batch, self.xbm_size, self.embed_dim, self.tile)

    @property
    def device_bytes(self) -> int:
        """Predicted peak on the device, beside the framework itself: the next chunk's images wait there too."""
        kept = min(self.keep_graphs, self.chunks - 1) * self.graph_bytes
        waiting = self.chunk_pairs * self.image_bytes
        return self.state_bytes + self.embedding_bytes + self.chunk_bytes + kept + waiting

    @property
    def pixel_bytes(self) -> int:
        """Host memory of the images of a step and of those read ahead."""
        return (self.chunks + self.chunks_ahead) * self.chunk_pairs * self.image_bytes

    def lines(self) -> list[str]:
        """The batch and its memory, for the start-up plan."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        kept = f", {_counted(self.keep_graphs, 'graph')} kept" if self.keep_graphs else ""
        return [
            f"batch      {self.effective_batch:,} pairs a step: {ranks} x {self.per_rank:,} pairs in "
            f"{_counted(self.chunks, 'chunk')} of {self.chunk_pairs:,}{kept}",
            f"negatives  {self.effective_batch - 1:,} fresh and {self.xbm_size:,} remembered negatives per anchor",
            f"memory     about {gigabytes(self.device_bytes)} on the device (weights and optimizer "
            f"{gigabytes(self.state_bytes)}, embeddings and loss {gigabytes(self.embedding_bytes)}, activations "
            f"{gigabytes(self.device_bytes - self.state_bytes - self.embedding_bytes)})",
        ]


def largest_part(pairs: int, most: int) -> int:
    """Size of the largest part of so many pairs, in the fewest parts of at most `most`, as equal as can be."""
    return ceil(pairs / ceil(pairs / most))


def embedding_bytes(effective_batch: int, xbm_size: int, embed_dim: int, tile: int) -> int:
    """Fresh embeddings of both towers, their gradients and sums over groups, the memory, and the loss's tiles.

    All in float32; tile: rows and columns of the logits that the loss holds at a time.
    """
    rows = 9 * effective_batch + 2 * xbm_size
    return 4 * (rows * embed_dim + 3 * min(tile, effective_batch) ** 2)


def oversize_warning(effective_batch: int, xbm_size: int, pairs: int | None) -> str | None:
    """What to say about a batch larger than the data set, or None."""
    if pairs is None or effective_batch <= pairs:
        return None
    smaller = max(1, effective_batch // 8)
    told = (
        f"--effective-batch {effective_batch} is {effective_batch / pairs:.1f} times the data set: each of the "
        f"{pairs:,} pairs recurs about {effective_batch / pairs:.0f} times in every step, and is encoded each time. "
    )
    if smaller > MOST_RECURRENCES * pairs:
        of_data = 2 ** max(1, int(log2(max(pairs, 2) / 2)))
        return f"{told}Use --effective-batch {of_data} --xbm-size 0 instead: a small data set wants many small steps"
    instead = f"--effective-batch {smaller} --xbm-size {max(xbm_size, effective_batch) - smaller}"
    return f"{told}Use {instead} instead: as many candidates, an eighth of the encoding, eight times the updates"


def useless_memory_warning(effective_batch: int, xbm_size: int, pairs: int | None) -> str | None:
    """What to say about a memory that a batch of a small data set leaves nothing new for, or None."""
    if pairs is None or effective_batch > pairs or xbm_size <= MOST_RECURRENCES * pairs:
        return None
    return (
        f"--xbm-size {xbm_size} is {xbm_size / pairs:.1f} times the data set: the memory holds nothing but older "
        f"copies of the {pairs:,} pairs. Use --xbm-size 0, or a larger --effective-batch"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def gigabytes(count: int) -> str:
    """`1.25 GiB`, or `12 MiB` below a tenth of that unit."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.0f} MiB"
