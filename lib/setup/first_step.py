"""Before the first update: start the bias where the data wants it, and verify the gradients if asked."""

from collections.abc import Sequence

import torch
from torch import nn

from lib.data import Chunk, StepChunks
from lib.distributed import gather_rows
from lib.gradcache.step import gather_ids
from lib.gradcache.verify import verify_gradients
from lib.losses import Pairs
from lib.losses.objective import Objective
from lib.losses.positives import Ids
from lib.losses.start_bias import bias_from_counts, solved_bias
from lib.runs.reporter import Reporter
from lib.setup.run import Run


def prepare_first_step(
    run: Run, objective: Objective, chunks: StepChunks, report: Reporter
) -> StepChunks | Sequence[Chunk]:
    """Start the bias and verify the gradients, where either is due; return the step's chunks, still to be computed."""
    towers = run.model.towers
    starts_fresh = run.progress.first_step == 0 and not towers.pretrained_bias
    trained_bias = towers.logit_bias if objective.family == "siglip" and starts_fresh and towers.use_bias else None
    if trained_bias is None and not run.config.verify_gradients:
        return chunks
    all_chunks = list(chunks)
    if isinstance(trained_bias, nn.Parameter):
        bias = _start_bias(run, all_chunks)
        with run.backend.editing(trained_bias):
            towers.set_scale_and_bias(None, bias)
        report.say(f"logit_bias starts at {bias:.3f}")
    if run.config.verify_gradients:
        verify_gradients(run.step.cache, run.backend, objective, all_chunks, bool(run.config.xbm_size), report.say)
    return all_chunks


@torch.no_grad()
def _start_bias(run: Run, chunks: list[Chunk]) -> float:
    """From the counts for towers that start fresh; solved on embeddings for a softmax-trained CLIP."""
    cache, config = run.step.cache, run.config
    chunks = chunks[:1] if run.model.pretrained else chunks
    ids = gather_ids([Ids.of(chunk) for chunk in chunks], cache.device)
    if config.positives == "pair":
        ids = ids.each_its_group()
    if not run.model.pretrained:
        return bias_from_counts(ids, config.xbm_size, config.pos_weight, run.same_text)
    output = cache.towers(**chunks[0].to(cache.device).inputs)
    images, texts = gather_rows(output.image_embeds), gather_rows(output.text_embeds)
    return solved_bias(Pairs(images, texts, *ids), output.logit_scale, config.pos_weight, run.same_text)
