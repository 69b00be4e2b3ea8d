"""BatchPlan: N, B, C, Q, W of a run, the memory that they need, and the words that tell the user so."""

from dataclasses import dataclass
from math import ceil, log2

import psutil
import torch
from torch import Tensor, nn

from lib.logit_tiles import TILE
from lib.replay import batch_norms_that_train

CPU_ACTIVATIONS = 256 * 2**20  # bytes; larger chunks are no faster on a CPU
LARGEST_CHUNK = 4096
MOST_RECURRENCES = 8  # of a pair, above which a batch or a memory is not merely large but out of place
DEVICE_SHARE = 0.85  # of the memory that is free on an accelerator
ACCELERATOR_PASS_1_PAIRS = 256  # pass 1 keeps no activations: small chunks are embedded together, in fewer kernels


@dataclass(frozen=True)
class BatchPlan:
    """The numbers of one optimizer step; letters as in the README."""

    effective_batch: int
    """N"""
    world_size: int
    """W"""
    chunk_size: int
    """C"""
    keep_graphs: int
    xbm_size: int
    """Q"""
    embed_dim: int
    """D"""
    image_bytes: int
    """Bytes of one image as it comes from the data."""
    activation_bytes: int
    """Activations of one pair that a backward pass needs."""
    state_bytes: int
    """Weights, gradients and optimizer state on one rank."""
    tile: int = TILE
    """Rows and columns of the logits that the loss holds at a time."""
    pass_1_pairs: int = 0
    """Pairs that pass 1 may embed in one forward; less than a chunk: a chunk."""

    @property
    def per_rank(self) -> int:
        """B"""
        return self.effective_batch // self.world_size

    @property
    def chunks(self) -> int:
        """K: tower forwards of one rank in pass 1."""
        return ceil(self.per_rank / self.chunk_size)

    @property
    def embedding_bytes(self) -> int:
        """Fresh embeddings of both towers, their gradients and sums over groups, the memory, and the loss's tiles."""
        return embedding_bytes(self.effective_batch, self.xbm_size, self.embed_dim, self.tile)

    @property
    def device_bytes(self) -> int:
        """Predicted peak on one rank's device, beside the framework itself."""
        graphs = min(self.keep_graphs + 1, self.chunks) * self.chunk_size * self.activation_bytes
        pixels = max(self.chunk_size, self.pass_1_pairs) * self.image_bytes * (1 + 4)  # as they came, and normalized
        return self.state_bytes + self.embedding_bytes + graphs + pixels

    @property
    def pixel_bytes(self) -> int:
        """Host memory of a step's images on one rank."""
        return self.per_rank * self.image_bytes

    def lines(self) -> list[str]:
        """The batch and its memory, for the start-up plan."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        kept = f", {_counted(self.keep_graphs, 'graph')} kept" if self.keep_graphs else ""
        return [
            f"batch      {self.effective_batch:,} pairs a step: {ranks} x {self.per_rank:,} pairs in "
            f"{_counted(self.chunks, 'chunk')} of {min(self.chunk_size, self.per_rank):,}{kept}",
            f"negatives  {self.effective_batch - 1:,} fresh and {self.xbm_size:,} remembered negatives per anchor",
            f"memory     about {gigabytes(self.device_bytes)} on the device (weights and optimizer "
            f"{gigabytes(self.state_bytes)}, embeddings and loss {gigabytes(self.embedding_bytes)}, activations "
            f"{gigabytes(self.device_bytes - self.state_bytes - self.embedding_bytes)}), "
            f"{gigabytes(self.pixel_bytes)} of images on the host",
        ]


def pass_1_pairs(device: torch.device) -> int:
    """Pairs that pass 1 may embed in one forward; 0 on a CPU, where forwards larger than a chunk gain nothing."""
    return 0 if device.type == "cpu" else ACCELERATOR_PASS_1_PAIRS


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


def measure_activations(towers: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that one pair takes in a forward of `towers` in training mode: what autograd saves, or, where a frozen
    trunk saves nothing, four times the largest output of a layer.

    inputs: what the forward takes, by name, of at least 4 pairs like the data's. Measured as the difference between 4
    and 2 pairs, so that what does not grow with the chunk drops out.
    """
    norms = batch_norms_that_train(towers)
    for norm in norms:  # a measurement must not move running statistics
        norm.eval()
    largest_output = 0

    def note_output(module: nn.Module, _: object, output: object) -> None:
        nonlocal largest_output
        if isinstance(output, Tensor) and output.ndim:
            largest_output = max(largest_output, output.nbytes // output.shape[0])

    hooks = [module.register_forward_hook(note_output) for module in towers.modules() if not list(module.children())]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in towers.parameters()}

    def saved_bytes(pairs: int) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = towers(**{name: tensor[:pairs] for name, tensor in inputs.items()})
        del output
        return sum(seen.values())

    with torch.random.fork_rng():
        difference = (saved_bytes(4) - saved_bytes(2)) // 2
    for hook in hooks:
        hook.remove()
    for norm in norms:
        norm.train()
    return max(difference, 4 * largest_output)


def largest_chunk(activation_bytes: int, per_rank: int) -> int:
    """C for --chunk-size auto on a CPU: the largest power of two whose activations are not more than pays."""
    chunk = 1
    while 2 * chunk <= min(per_rank, LARGEST_CHUNK) and 2 * chunk * activation_bytes <= CPU_ACTIVATIONS:
        chunk *= 2
    return chunk


def graphs_that_fit(plan: BatchPlan, device: torch.device, local_ranks: int) -> int:
    """Chunks for --keep-graphs auto: what fits into the memory that is left beside the plan.

    On a device of its own all but a margin for what the allocator loses between blocks; on a CPU half, which others
    need as well, and the images of this and of the next step lie there too.
    """
    if device.type == "cpu":
        spare = (free_memory(device) // local_ranks - plan.device_bytes - 2 * plan.pixel_bytes) // 2
    else:
        spare = int(DEVICE_SHARE * free_memory(device)) - plan.device_bytes
    return max(0, min(plan.chunks, spare // (plan.chunk_size * plan.activation_bytes)))


def free_memory(device: torch.device) -> int:
    """Bytes free on the device now (on a CPU: available in the machine)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def total_memory(device: torch.device) -> int:
    """Bytes that the device has, in use or not (on a CPU: of the machine)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def gigabytes(count: int) -> str:
    """`1.25 GiB`, or `12 MiB` below a tenth of that unit."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.0f} MiB"
