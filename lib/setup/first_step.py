"""Before the first update: start the bias where the data wants it, and verify the gradients if asked."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from lib.data import Chunk, StepChunks
from lib.distributed import gather_rows
from lib.gradcache.step import Chunks, gather_ids
from lib.gradcache.verify import verify_gradients
from lib.losses import Pairs
from lib.losses.objective import Objective
from lib.losses.positives import Ids, SameText, count_positives
from lib.losses.sigmoid import PosWeight, positive_weight, sigmoid
from lib.runs.reporter import Reporter
from lib.setup.run import Run

SOLVED_ON = 2048  # pairs that the solved bias is taken from: more would not move it


def prepare_first_step(run: Run, objective: Objective, chunks: StepChunks, report: Reporter) -> Chunks:
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
    """From the counts for towers that start fresh; solved on embeddings for a softmax-trained CLIP.

    Without it the first steps only find the bias. At the start nearly all pairs are negatives; a bias of -ln(negatives
    per positive) makes the expected loss of both kinds equal (Zhai et al., 2023, section 3.2, whose -10 belongs to a
    batch of about 22,000).
    """
    cache, config = run.step.cache, run.config
    chunks = chunks[:1] if run.model.pretrained else chunks
    ids = gather_ids([Ids.of(chunk) for chunk in chunks], cache.device)
    if config.positives == "pair":
        ids = ids.each_its_group()
    if not run.model.pretrained:
        return bias_from_counts(ids, config.pos_weight, run.same_text)
    output = cache.towers(**chunks[0].to(cache.device).inputs)
    images, texts = gather_rows(output.image_embeds), gather_rows(output.text_embeds)
    return solved_bias(Pairs(images, texts, *ids), output.logit_scale, config.pos_weight, run.same_text)


def bias_from_counts(ids: Ids, pos_weight: PosWeight = 1.0, same_text: SameText = "negative") -> float:
    """-ln(negatives per weighted positive) among N fresh pairs of these ids, (N,) each; a memory does not change it."""
    positives, candidates = (count.item() for count in count_positives(ids, same_text))
    negatives = candidates - positives
    weight = float(positive_weight(pos_weight, ids, same_text))
    return -math.log(max(negatives, 1.0) / (positives * weight))


def solved_bias(
    pairs: Pairs, logit_scale: Tensor, pos_weight: PosWeight = 1.0, same_text: SameText = "negative"
) -> float:
    """The bias at which the sigmoid loss of these pairs is least, at this scale: a softmax-trained model's start."""
    rows = slice(0, min(len(pairs), SOLVED_ON))
    some = Pairs(pairs.image_embeds[rows], pairs.text_embeds[rows], *pairs.ids.rows(rows))
    slope = partial(sigmoid, some, None, logit_scale, rows=rows, pos_weight=pos_weight, same_text=same_text)
    low, high = -2 * float(logit_scale) - 20, 2 * float(logit_scale) + 20
    for _ in range(40):  # the loss is convex in the bias: halve the bracket of its derivative's zero
        middle = (low + high) / 2
        bias = torch.tensor(middle, device=logit_scale.device)
        if slope(logit_bias=bias).logit_bias > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2
