"""The memory bank equals an explicit concatenation of past steps, wraps around, and survives a save."""

import math

import pytest
import torch
from naive import random_pairs

from lib.losses.xbm import CrossBatchMemory, Drift, MemorySwitch, aligned

DIM = 4


def batches(sizes):
    first = 0
    for seed, size in enumerate(sizes):
        yield random_pairs(size, DIM, seed=seed, first_id=first, texts=7)
        first += size


def as_set(pairs):
    return {
        (*ids, *i.tolist(), *t.tolist())
        for *ids, i, t in zip(
            *(column.tolist() for column in pairs.ids), pairs.image_embeds, pairs.text_embeds, strict=True
        )
    }


@pytest.mark.parametrize("sizes", [[3], [3, 4], [3, 4, 5, 6], [5, 5], [10], [25], [4, 23, 2], [10, 10, 10]])
def test_the_bank_is_the_newest_q_pairs(sizes):
    memory = CrossBatchMemory(10, DIM, dtype=torch.float64)
    history = list(batches(sizes))
    for step, fresh in enumerate(history):
        memory.enqueue(fresh, step)
    kept = ("image_embeds", "text_embeds", "group", "sample_id", "text_id")
    newest = as_set(type(history[0])(*(torch.cat([getattr(p, name) for p in history])[-10:] for name in kept)))
    assert as_set(memory.pairs()) == newest
    assert len(memory) == min(10, sum(sizes))


def test_an_empty_bank_and_a_bank_of_size_zero_remember_nothing():
    assert CrossBatchMemory(10, DIM).pairs() is None
    memory = CrossBatchMemory(0, DIM)
    memory.enqueue(random_pairs(3, DIM, seed=0), step=0)
    assert memory.pairs() is None


def test_state_dict_resumes_in_the_middle_of_the_ring():
    steps = list(batches([4, 5, 6, 3]))
    unbroken, saved = CrossBatchMemory(10, DIM), CrossBatchMemory(10, DIM)
    for step, fresh in enumerate(steps):
        unbroken.enqueue(fresh, step)
    for step, fresh in enumerate(steps[:2]):
        saved.enqueue(fresh, step)
    resumed = CrossBatchMemory(10, DIM)
    resumed.load_state_dict({k: v.clone() for k, v in saved.state_dict().items()})
    for step, fresh in enumerate(steps[2:], start=2):
        resumed.enqueue(fresh, step)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_bank_saved_before_it_had_normalizers_fills_anew():
    memory = CrossBatchMemory(6, DIM, dtype=torch.float64)
    memory.enqueue(random_pairs(6, DIM, seed=2, first_id=50), 1)
    state = memory.state_dict()
    memory.load_state_dict(state)
    assert len(memory) == 6
    memory.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith("normalizer")})
    assert memory.pairs() is None


def test_remembered_embeddings_follow_the_mean_and_deviation_of_the_batch():
    """Negative control: as they were stored, they lie elsewhere."""
    fresh = random_pairs(200, DIM, seed=1).image_embeds
    moved = torch.nn.functional.normalize(
        fresh + 2 * torch.eye(DIM, dtype=torch.float64)[0], dim=1
    )  # the towers have moved all
    apart = [float((old.mean(0) - fresh.mean(0)).norm()) for old in (moved, aligned(moved, fresh))]
    assert apart[1] < 0.2 < 0.5 < apart[0]
    assert torch.allclose(aligned(moved, fresh).norm(dim=1), torch.ones(200, dtype=torch.float64))
    assert torch.equal(aligned(moved, fresh[:15]), moved), "so few say nothing about mean and deviation"
    assert torch.allclose(aligned(fresh, fresh), fresh)


def test_a_bank_of_another_size_is_refused():
    with pytest.raises(ValueError, match="10 pairs of dimension 4"):
        CrossBatchMemory(8, DIM).load_state_dict(CrossBatchMemory(10, DIM).state_dict())


def test_drift_compares_with_the_newest_copy_of_the_same_sample():
    memory = CrossBatchMemory(20, DIM, dtype=torch.float64)
    old, newer, now = (random_pairs(6, DIM, seed=seed) for seed in (1, 2, 3))  # the same six samples
    memory.enqueue(random_pairs(5, DIM, seed=8, first_id=50), 0)
    memory.enqueue(old, 1)
    memory.enqueue(newer, 2)
    image, text, samples = memory.drift(now).tolist()
    assert samples == 6
    assert image == pytest.approx(1 - (now.image_embeds * newer.image_embeds).sum(1).mean().item())
    assert text == pytest.approx(1 - (now.text_embeds * newer.text_embeds).sum(1).mean().item())
    assert memory.drift(newer)[0].item() == pytest.approx(0, abs=1e-12)
    half = random_pairs(6, DIM, seed=3, first_id=3)  # samples 3 to 8, of which the first three are remembered
    cosines = (half.image_embeds[:3] * newer.image_embeds[3:]).sum(1)
    assert memory.drift(half).tolist()[::2] == pytest.approx([1 - cosines.mean().item(), 3])


def test_without_recurring_samples_there_is_no_drift_reading():
    memory = CrossBatchMemory(20, DIM)
    for _ in range(2):
        image, text, samples = memory.drift(random_pairs(5, DIM, seed=2, first_id=99)).tolist()
        assert samples == 0 and math.isnan(image) and math.isnan(text)
        memory.enqueue(random_pairs(5, DIM, seed=1), 0)


def test_age_is_counted_in_steps():
    memory = CrossBatchMemory(4, DIM)
    memory.enqueue(random_pairs(2, DIM, seed=1), 10)
    memory.enqueue(random_pairs(2, DIM, seed=1), 12)
    assert memory.mean_age(13) == pytest.approx((3 + 1) / 2)


NO_READING = Drift(math.nan, math.nan, 0)


def on_from(switch: MemorySwitch, drifts: list[Drift], full_from: int = 1) -> int | None:
    """The first step that uses the memory, given the drift read at steps 1, 2, ..."""
    for step, drift in enumerate(drifts, start=1):
        if switch.on:
            return step
        switch.update(step, drift, was_full=step >= full_from)
    return len(drifts) + 1 if switch.on else None


def test_the_memory_is_switched_on_at_a_given_step():
    assert on_from(MemorySwitch(3, warmup_steps=9), [NO_READING] * 5) == 3
    assert MemorySwitch(0, warmup_steps=9).on


def test_auto_waits_for_warmup_and_for_a_small_drift_in_both_towers():
    moving, still = Drift(0.05, 0.4, 7), Drift(0.05, 0.09, 7)
    assert on_from(MemorySwitch("auto", 2), [still] * 5) == 3
    assert on_from(MemorySwitch("auto", 2), [moving, moving, moving, still, still]) == 5
    assert on_from(MemorySwitch("auto", 2), [moving] * 5) is None


def test_auto_without_recurring_samples_waits_for_a_full_memory():
    assert on_from(MemorySwitch("auto", 1), [NO_READING] * 6, full_from=4) == 5


def test_the_switch_stays_on_through_a_resume():
    before = MemorySwitch("auto", 0)
    before.update(1, Drift(0.0, 0.0, 3), was_full=False)
    after = MemorySwitch("auto", 0)
    after.load_state_dict(before.state_dict())
    assert before.on and after.on
