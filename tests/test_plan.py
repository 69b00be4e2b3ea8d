"""The plan's numbers: what a step needs, what auto chooses, and where the sigmoid loss's bias starts."""

import math

import pytest
import torch
from naive import fresh_kind, random_pairs

from lib.losses import sigmoid
from lib.setup.chunk_memory import measure_activations
from lib.setup.first_step import bias_from_counts, solved_bias
from lib.setup.plan import MARGIN, BatchPlan, graphs_that_fit, oversize_warning, useless_memory_warning
from lib.towers import build_preset
from lib.towers.trainable import set_trainable


def plan(**changes) -> BatchPlan:
    settings = {
        "effective_batch": 1000, "world_size": 2, "chunk_size": 64, "keep_graphs": 0, "xbm_size": 300,
        "embed_dim": 16, "image_bytes": 3072, "graph_bytes": 1000, "chunk_bytes": 1500, "state_bytes": 10,
    }  # fmt: skip
    return BatchPlan(**settings | changes)


def four_pairs(processing) -> dict[str, torch.Tensor]:
    input_ids, attention_mask = processing.tokenize(["a photo of a cat"] * 4)
    pixel_values = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    return {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}


def test_chunks_cover_the_rank_and_are_alike():
    assert (plan().per_rank, plan().chunks, plan().chunk_pairs) == (500, 8, 63)
    assert plan(chunk_size=500).chunks == 1


def test_host_memory_is_that_of_a_step_and_of_what_is_read_ahead():
    assert plan().pixel_bytes == 8 * 63 * 3072
    assert plan(chunks_ahead=3).pixel_bytes == 11 * 63 * 3072


def test_more_of_anything_needs_more_memory():
    for change in ({"keep_graphs": 3}, {"xbm_size": 9000}, {"chunk_bytes": 1501}, {"effective_batch": 5000}):
        assert plan(**change).device_bytes > plan().device_bytes, change


def test_the_plan_names_fresh_and_remembered_negatives():
    assert any("999 fresh and 300 remembered negatives per anchor" in line for line in plan().lines())


def test_measured_activations_predict_what_autograd_saves():
    """Twice as many layers save about twice as much, and a frozen tower saves nothing of its trunk."""
    towers, processing = build_preset("tiny-clip", ["a photo of a cat"])
    towers.train()
    inputs = four_pairs(processing)
    whole = measure_activations(towers, inputs)
    # 17 tokens of 64 numbers in float32 enter each of some 25 operations of two layers: a sanity band.
    assert 17 * 64 * 4 * 20 < whole < 17 * 64 * 4 * 200
    set_trainable(towers, ["image"])
    assert measure_activations(towers, inputs) < whole / 2


def test_stored_outputs_of_a_frozen_trunk_need_no_activations_of_it():
    towers, processing = build_preset("tiny-clip", ["a photo of a cat"])
    set_trainable(towers, ["image.trunk", "text.trunk"])
    towers.train()
    inputs = four_pairs(processing)
    pooled = towers(**inputs)
    stored = {"image_pooled": pooled.image_pooled, "text_pooled": pooled.text_pooled}
    assert measure_activations(towers, stored) < measure_activations(towers, inputs) / 2


def test_measuring_moves_neither_weights_nor_random_state():
    towers, processing = build_preset("tiny-siglip", ["a photo of a cat"], dropout=0.3)
    towers.train()
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in towers.named_parameters()}
    measure_activations(towers, four_pairs(processing))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[n], p) and p.grad is None for n, p in towers.named_parameters())


def test_auto_keeps_the_graphs_that_fit_beside_the_plan():
    few = plan(graph_bytes=64 * 2**20)  # of 8 chunks
    for device, beside in (("cpu", few.device_bytes + 2 * few.pixel_bytes), ("cuda", few.device_bytes)):
        share = 0.5 if device == "cpu" else 1
        for free, kept in ((0, 0), (beside, 0), (beside + 3.1 * 64 * 2**20 / share, 3), (2**40, 8)):
            free = free if device == "cpu" else free / MARGIN
            assert graphs_that_fit(few, int(free), torch.device(device)) == kept, (device, free)


def test_a_batch_above_the_data_set_is_told_with_what_to_use_instead():
    warning = oversize_warning(32768, 32768, 1442)
    assert "has 1,442 pairs" in warning and "32768 repeats each 22.7 times a step" in warning
    assert "--effective-batch 4096 --xbm-size 28672" in warning
    assert "--effective-batch 64 --xbm-size 0:" in oversize_warning(32768, 32768, 184)
    assert "--effective-batch 2 --xbm-size 0:" in oversize_warning(32768, 32768, 1)
    assert oversize_warning(1000, 0, 1442) is None and oversize_warning(1000, 0, None) is None


def test_a_memory_above_the_data_set_is_told():
    assert "a memory of 32768 holds each 178.1 times" in useless_memory_warning(64, 32768, 184)
    assert useless_memory_warning(64, 184, 184) is None and useless_memory_warning(64, 32768, None) is None
    assert useless_memory_warning(32768, 32768, 184) is None, "the batch's own warning says what to use"
    assert "--effective-batch 256 --xbm-size 1792" in oversize_warning(2048, 512, 1422)
    assert useless_memory_warning(256, 1792, 1422) is None, "that advice is not contradicted"


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("same_text", ["exclude", "positive", "negative"])
def test_the_start_bias_counts_negatives_per_positive(groups, same_text):
    pairs, size = random_pairs(12, 4, seed=0, groups=groups, texts=5), 12
    kinds = [fresh_kind(pairs, i, j, same_text) for i in range(size) for j in range(size)]
    positives, negatives = kinds.count(True) / size, kinds.count(False) / size
    found = bias_from_counts(pairs.ids, same_text=same_text)
    assert found == pytest.approx(-math.log(negatives / positives))
    balanced = bias_from_counts(pairs.ids, "balanced", same_text)
    assert balanced == pytest.approx(0), "balanced weights make both kinds weigh the same"


def test_the_solved_bias_is_the_minimum_of_the_loss():
    pairs, scale = random_pairs(30, 4, seed=1, groups=5), torch.tensor(20.0, dtype=torch.float64)
    bias = solved_bias(pairs, scale)
    losses = [
        sigmoid(pairs, None, scale, torch.tensor(bias + move, dtype=torch.float64), slice(0, 30)).loss
        for move in (-0.1, 0.0, 0.1)
    ]
    assert losses[1] < min(losses[0], losses[2])
