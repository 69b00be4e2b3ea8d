"""Gradients of one step on the parameters: by accumulation without shared negatives (the floor), or the cached step."""

from collections.abc import Sequence

from subjects import Autocast

from lib.data import Chunk
from lib.gradcache.step import GradCache, cached_step
from lib.losses import Pairs, infonce
from lib.losses.objective import dense_infonce
from lib.losses.positives import Ids


def plain(towers: Autocast, chunks: Sequence[Chunk]) -> None:
    """Gradient accumulation: the loss of each chunk alone."""
    for chunk in chunks:
        output = towers(**chunk.to(towers.device).inputs)
        fresh = Pairs(output.image_embeds, output.text_embeds, *Ids.of(chunk.to(towers.device)))
        loss = dense_infonce(fresh, None, output.logit_scale, output.logit_bias)
        (loss / len(chunks)).backward()


def ours(towers: Autocast, chunks: Sequence[Chunk], keep_graphs: int = 0, remembered: Pairs | None = None) -> None:
    cached_step(GradCache(towers, towers.device, keep_graphs=keep_graphs), chunks, infonce, remembered)
