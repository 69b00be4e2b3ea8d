"""Tries the towers on a few pairs of the data before a run: what fits, what it costs, and what may be encoded once."""

from dataclasses import dataclass, replace
from functools import partial

from lib.backends import Backend
from lib.checkpoint import TrainingState
from lib.collectives import gather_objects
from lib.config import TrainConfig
from lib.errors import InputError
from lib.logit_tiles import tile_side
from lib.plan import (
    LARGEST_CHUNK,
    BatchPlan,
    embedding_bytes,
    free_memory,
    gigabytes,
    graphs_that_fit,
    largest_chunk,
    measure_activations,
    pass_1_pairs,
    total_memory,
)
from lib.probe import Costs, largest_that_fits, measure_costs, peak_of_chunk
from lib.replay import batch_norms_that_train
from lib.run import recompute_of
from lib.shared_texts import TEXT_INPUTS, Inputs, same_every_time
from lib.towers import TwoTowers


@dataclass(frozen=True)
class Trial:
    """The towers, not yet wrapped, and what a forward takes of a few pairs, on the device; all ranks ask alike."""

    config: TrainConfig
    backend: Backend
    towers: TwoTowers
    inputs: Inputs

    def plan(self, image_bytes: int, state: TrainingState | None) -> BatchPlan:
        """The batch, with what is `auto` settled alike on all ranks.

        image_bytes: of one image as it comes from the data. InputError for a batch whose embeddings cannot fit.
        """
        config, device = self.config, self.backend.accelerator.device
        with self.backend.autocast():
            activations = measure_activations(self.towers, self.inputs)
        chunk_size, keep = config.chunk_size, config.keep_graphs
        if state:  # what was measured then holds, so that dropout's masks and sums stay the same
            chunk_size = state.progress["chunk_size"] if chunk_size == "auto" else chunk_size
            keep = state.progress["keep_graphs"] if keep == "auto" else keep
        if isinstance(chunk_size, str):  # auto
            fits: int = min(gather_objects(self._largest_chunk(activations)))
            chunk_size = fits
        plan = BatchPlan(
            effective_batch=config.effective_batch,
            world_size=self._world_size,
            chunk_size=chunk_size,
            keep_graphs=0,
            xbm_size=config.xbm_size,
            embed_dim=self.towers.embed_dim,
            image_bytes=image_bytes,
            activation_bytes=activations,
            state_bytes=self._state_bytes,
            tile=tile_side(device),
            pass_1_pairs=pass_1_pairs(device),
        )
        if plan.embedding_bytes > total_memory(device):
            raise InputError(
                f"--effective-batch {config.effective_batch} and --xbm-size {config.xbm_size} take "
                f"{gigabytes(plan.embedding_bytes)} for embeddings alone, and {device.type} has "
                f"{gigabytes(total_memory(device))}; lower them"
            )
        if self.backend.shards_weights:
            keep = 0
        elif isinstance(keep, str):  # auto
            graphs: int = min(gather_objects(graphs_that_fit(plan, device, self._world_size)))
            keep = graphs
        return replace(plan, keep_graphs=min(keep, plan.chunks))

    def costs(self, plan: BatchPlan) -> Costs:
        """What a pair takes in the towers, in chunks of the plan."""
        again, pairs = recompute_of(self.towers), min(plan.chunk_size, plan.per_rank)
        device = self.backend.accelerator.device
        with self.backend.autocast():
            return measure_costs(
                self.towers, self.inputs, pairs, device, again["image_recompute"], again["text_recompute"]
            )

    def shares_texts(self) -> bool:
        """Whether to encode each distinct text of a step once: where that is exact.

        Not where weights are sharded: ranks would differ in the chunks that have texts, and must run the same forwards.
        """
        if self.backend.shards_weights or self.config.shared_texts == "off":
            return False
        return self._exact({name: tensor for name, tensor in self.inputs.items() if name in TEXT_INPUTS})

    def chunks_together(self, plan: BatchPlan) -> int:
        """Chunks that pass 1 embeds in one forward: more than one where that is exact.

        Not where weights are sharded: ranks differ in which neighbours have texts of one length.
        """
        together = max(1, plan.pass_1_pairs // plan.chunk_size)
        if together == 1 or self.backend.shards_weights or batch_norms_that_train(self.towers):
            return 1
        return together if self._exact(self.inputs) else 1

    def _exact(self, inputs: Inputs) -> bool:
        """Whether no rank's towers draw anything at random for these."""
        with self.backend.autocast():
            return all(gather_objects(same_every_time(self.towers, inputs)))

    def _largest_chunk(self, activations: int) -> int:
        """C for --chunk-size auto: tried on an accelerator; reckoned on a CPU, where one too large ends the process."""
        config, device = self.config, self.backend.accelerator.device
        per_rank = config.effective_batch // self._world_size
        if device.type == "cpu":
            return largest_chunk(activations, per_rank)
        # To come beside the chunk: gradients and moments, and the embeddings with the loss's tiles.
        weights = sum(parameter.nbytes for parameter in self.towers.parameters())
        room = free_memory(device) - (self._state_bytes - weights)
        room -= embedding_bytes(config.effective_batch, config.xbm_size, self.towers.embed_dim, tile_side(device))
        peak = partial(peak_of_chunk, self.towers, self.inputs, device)
        with self.backend.autocast():
            return largest_that_fits(peak, min(per_rank, LARGEST_CHUNK), room)

    @property
    def _world_size(self) -> int:
        return self.backend.accelerator.num_processes

    @property
    def _state_bytes(self) -> int:
        """Weights, their average, gradients and moments, on one rank."""
        weights = sum(parameter.nbytes for parameter in self.towers.parameters())
        trained = sum(parameter.nbytes for parameter in self.towers.parameters() if parameter.requires_grad)
        moments = 0 if self.config.optimizer == "sgd" else 2
        return self.backend.state_bytes(weights, trained, moments) + (weights if self.config.ema else 0)
