"""Naive twins of the losses: every pair written out, with plain autograd; slow and easy to verify."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.losses import Pairs
from lib.losses.xbm import ENOUGH


def random_pairs(
    count: int, dim: int, seed: int, groups: int | None = None, first_id: int = 0, texts: int | None = None
) -> Pairs:
    """Unit-norm float64 pairs, each of one of `groups` groups and with one of `texts` texts, or each with its own."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(count, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    group = torch.randint(groups, (count,), generator=generator) if groups else torch.arange(count) + first_id
    text_id = torch.randint(texts, (count,), generator=generator) if texts else torch.arange(count) + first_id
    embeds = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    normalizers = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return Pairs(*embeds, group, torch.arange(count) + first_id, text_id, None, *normalizers)


def naive_sigmoid(
    fresh: Pairs,
    remembered: Pairs | None,
    scale: Tensor,
    bias: Tensor,
    *,
    pos_weight: float | str = 1.0,
    same_text: str = "negative",
) -> Tensor:
    """A double loop over all pairs; with a memory the pairs that are not a row's own share their weight with it."""
    count, remembered = len(fresh), as_fresh(remembered, fresh)
    if pos_weight == "balanced":
        kinds = [fresh_kind(fresh, i, j, same_text) for i in range(count) for j in range(count)]
        pos_weight = kinds.count(False) / kinds.count(True)
    others, old = 1.0, 0.0
    if remembered:
        of_memory = min(0.5, len(remembered) / (count - 1 + len(remembered)))
        others, old = 1 - of_memory, of_memory * (count - 1) / len(remembered)
    total = torch.zeros((), dtype=fresh.image_embeds.dtype)
    for i in range(count):
        for j in range(count):
            positive = fresh_kind(fresh, i, j, same_text)
            if positive is not None:
                logit = fresh.image_embeds[i] @ fresh.text_embeds[j] * scale + bias
                total = total + (1.0 if i == j else others) * _sigmoid_term(logit, positive, pos_weight)
        for text in fresh.negative_texts if fresh.negative_texts is not None else ():
            total = total + _sigmoid_term(fresh.image_embeds[i] @ text * scale + bias, False, pos_weight)
        for j in range(len(remembered) if remembered else 0):
            positive = _remembered_kind(fresh, remembered, i, j, same_text)
            if positive is None:
                continue
            for anchor, other in (
                (fresh.image_embeds[i], remembered.text_embeds[j]),
                (fresh.text_embeds[i], remembered.image_embeds[j]),
            ):
                logit = twice_the_slope(anchor) @ other * scale + bias
                total = total + old / 2 * _sigmoid_term(logit, positive, pos_weight)
    return total / count


def naive_infonce(
    fresh: Pairs,
    remembered: Pairs | None,
    scale: Tensor,
    bias: Tensor,
    *,
    label_smoothing: float = 0.0,
    same_text: str = "negative",
) -> Tensor:
    """One cross-entropy with a probability target per anchor, and the slopes of the remembered anchors."""
    total, remembered = torch.zeros((), dtype=fresh.image_embeds.dtype), as_fresh(remembered, fresh)
    negatives = list(fresh.negative_texts) if fresh.negative_texts is not None else []
    for anchors, others, old, more in (
        (fresh.image_embeds, fresh.text_embeds, remembered.text_embeds if remembered else None, negatives),
        (fresh.text_embeds, fresh.image_embeds, remembered.image_embeds if remembered else None, []),
    ):
        for i in range(len(fresh)):
            candidates, positives, of_memory = [], [], []
            for j in range(len(fresh)):
                positive = fresh_kind(fresh, i, j, same_text)
                if positive is not None:
                    candidates.append(others[j])
                    positives.append(positive)
            for j in range(len(remembered) if remembered else 0):
                positive = _remembered_kind(fresh, remembered, i, j, same_text)
                if positive is not None:
                    of_memory.append((j, len(candidates)))
                    candidates.append(old[j])
                    positives.append(positive)
            candidates += more
            positives += [False] * len(more)
            target = torch.tensor(positives, dtype=anchors.dtype)
            target = (1 - label_smoothing) * target / target.sum() + label_smoothing / len(target)
            logits = torch.stack(candidates) @ anchors[i] * scale + bias
            total = total + F.cross_entropy(logits[None], target[None])
            for j, place in of_memory:  # the remembered pair as the anchor of this fresh one
                is_text = anchors is fresh.image_embeds
                mean = (remembered.text_normalizer if is_text else remembered.image_normalizer)[j].exp()
                not_met = len(remembered) + (0 if is_text else len(negatives))
                met = [
                    (candidates[place] @ anchors[k] * scale).detach().exp()
                    for k in range(len(fresh))
                    if _remembered_kind(fresh, remembered, k, j, same_text) is not None
                ]
                logit = candidates[place] @ anchors[i] * scale
                probability = logit.detach().exp() / (sum(met) + not_met * mean)
                term = (probability - target[place]) * logit
                total = total + term - term.detach()
    return total / (2 * len(fresh))


def as_fresh(remembered: Pairs | None, fresh: Pairs) -> Pairs | None:
    """The remembered embeddings, each dimension with the mean and deviation that it has in the fresh ones."""
    if remembered is None or len(fresh) < ENOUGH:
        return remembered
    moved = {}
    for name in ("image_embeds", "text_embeds"):
        old, new = getattr(remembered, name), getattr(fresh, name).detach()
        columns = [
            (old[:, d] - old[:, d].mean()) / old[:, d].var(correction=0).sqrt() * new[:, d].var(correction=0).sqrt()
            + new[:, d].mean()
            for d in range(old.shape[1])
        ]
        moved[name] = torch.stack([row / row.norm() for row in torch.stack(columns, 1)])
    return replace(remembered, **moved)


def with_normalizers(fresh: Pairs, remembered: Pairs | None, scale: Tensor) -> Pairs:
    """The pairs, detached, with the log of the mean exponential of their logits; where no candidate is left out."""
    images, texts, old = fresh.image_embeds.detach(), fresh.text_embeds.detach(), as_fresh(remembered, fresh)
    found = []
    for anchors, others, more in (
        (images, texts, old.text_embeds if old else texts[:0]),
        (texts, images, old.image_embeds if old else images[:0]),
    ):
        logits = scale.detach() * anchors @ torch.cat([others, more]).T
        found.append(logits.exp().mean(1).log())
    return Pairs(images, texts, *fresh.ids, None, *found)


def twice_the_slope(value: Tensor) -> Tensor:
    return 2 * value - value.detach()


def _sigmoid_term(logit: Tensor, positive: bool, pos_weight: float) -> Tensor:
    return pos_weight * F.softplus(-logit) if positive else F.softplus(logit)


def fresh_kind(fresh: Pairs, i: int, j: int, same_text: str) -> bool | None:
    """True: a positive, False: a negative, None: left out."""
    return _kind(fresh, fresh, i, j, same_text)


def _remembered_kind(fresh: Pairs, remembered: Pairs, i: int, j: int, same_text: str) -> bool | None:
    """True: a positive, False: a negative, None: left out."""
    same_sample = fresh.sample_id[i] == remembered.sample_id[j]
    return None if same_sample else _kind(fresh, remembered, i, j, same_text)


def _kind(fresh: Pairs, others: Pairs, i: int, j: int, same_text: str) -> bool | None:
    if fresh.group[i] == others.group[j]:
        return True
    if fresh.text_id[i] == others.text_id[j]:
        return {"exclude": None, "positive": True, "negative": False}[same_text]
    return False
