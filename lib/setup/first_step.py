"""Before the first update: where the bias starts, and whether the gradients are right."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from lib.backends.precision import full_float32
from lib.data import Chunk
from lib.distributed import gather_rows
from lib.errors import RunError
from lib.gradcache import verify
from lib.gradcache.random_state import RandomState, batch_norm_statistics, restore_statistics
from lib.gradcache.step import cached_step, gather_ids
from lib.losses import Pairs
from lib.losses.objective import Objective
from lib.losses.positives import Ids
from lib.losses.start_bias import bias_from_counts, solved_bias
from lib.runs.reporter import Reporter
from lib.setup.run import Run


def prepare_first_step(run: Run, objective: Objective, chunks: Iterable[Chunk], report: Reporter) -> list[Chunk] | None:
    """Start the bias where the data wants it, and verify the gradients if asked.

    Returns the chunks where this read them all; None where there was nothing to do and they are still to be read.
    """
    starts_fresh = run.first_step == 0 and not run.towers.pretrained_bias
    starts_bias = objective.family == "siglip" and starts_fresh and run.towers.use_bias
    trained_bias = run.towers.logit_bias if starts_bias else None
    if trained_bias is None and not run.config.verify_gradients:
        return None
    chunks = list(chunks)
    if isinstance(trained_bias, nn.Parameter):
        bias = _start_bias(run, chunks)
        with run.backend.editing(trained_bias):
            run.towers.set_scale_and_bias(None, bias)
        report.say(f"logit_bias starts at {bias:.3f}")
    if run.config.verify_gradients:
        _verify(run, objective, chunks, report)
    return chunks


@torch.no_grad()
def _start_bias(run: Run, chunks: list[Chunk]) -> float:
    """From the counts for towers that start fresh; solved on embeddings for a softmax-trained CLIP."""
    device, config = run.accelerator.device, run.config
    chunks = chunks[:1] if run.pretrained else chunks
    ids = gather_ids([Ids.of(chunk) for chunk in chunks], device)
    if config.positives == "pair":
        ids = ids.each_its_group()
    if not run.pretrained:
        return bias_from_counts(ids, config.xbm_size, config.pos_weight, run.same_text)
    output = run.wrapped(**chunks[0].to(device).inputs)
    images, texts = gather_rows(output.image_embeds), gather_rows(output.text_embeds)
    return solved_bias(Pairs(images, texts, *ids), output.logit_scale, config.pos_weight, run.same_text)


def _verify(run: Run, objective: Objective, chunks: list[Chunk], report: Reporter) -> None:
    """Compare the cached step with plain autograd on a few pairs, with all that the run uses; stop at a difference."""
    device, tolerance = run.accelerator.device, verify.TOLERANCE[run.backend.precision.name]
    statistics, random_state = batch_norm_statistics(run.towers), RandomState.capture(device)
    few = verify.small_chunks(chunks)
    kept = run.plan.keep_graphs
    extras = verify.Extras(
        negatives=verify.small_negatives(run.negatives),
        remembered=verify.small_memory(run.wrapped, few, device) if run.config.xbm_size else None,
        tile=max(1, 2 * sum(map(len, few)) // 5),  # not a divisor: the last tile is smaller
        keep_graphs=len(few) if kept >= run.plan.chunks else min(kept, len(few) - 1),
    )

    def compare(extras: verify.Extras) -> verify.Comparison:
        cached = partial(
            cached_step,
            run.wrapped,
            few,
            partial(objective.loss, tile=extras.tile),
            extras.remembered,
            device=device,
            backward=run.backend.backward,
            no_sync=run.backend.no_sync,
            keep_graphs=extras.keep_graphs,
            negatives=extras.negatives,
            share=run.share_texts,
            **run.recompute,
        )
        plain = partial(verify.plain_autograd, run.backend, few, extras, objective.dense, device)
        return verify.compare_gradients(run.backend, cached, plain, device)

    with full_float32():
        where, found = verify.first_faulty(compare, extras, tolerance)
    restore_statistics(statistics)
    random_state.restore()
    report.say(
        "verify-gradients: largest relative difference "
        + ", ".join(f"{part} {difference:.1e}" for part, difference in found.differences.items())
    )
    if not found.within(tolerance):
        raise RunError(
            f"--verify-gradients: the cached step's gradients differ from plain autograd's"
            f"{f' with {where}, and not without' * bool(where)}: "
            f"{'; '.join([*found.faults, f'largest relative differences {found.differences}'])}, allowed {tolerance}; "
            "batch norm in training mode and chunk-dependent layers do this, else it is a fault here"
        )
