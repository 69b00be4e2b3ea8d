"""The tiled losses equal a double loop over all pairs: value and every gradient, in float64."""

from dataclasses import replace
from functools import partial
from itertools import cycle, product

import pytest
import torch
from naive import naive_infonce, naive_sigmoid, random_pairs

from lib.losses import LossShare, Pairs, infonce, positives, sigmoid
from lib.losses import tiles as logit_tiles
from lib.losses.objective import Objective, dense_infonce, dense_sigmoid
from lib.losses.positives import Ids

DIM = 5


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 7, so that 17 rows need several, and the last does not fill."""
    monkeypatch.setattr(logit_tiles, "TILE", 7)


def autograd(naive, fresh: Pairs, remembered, scale, bias, **options):
    """Value and gradients of the naive twin, as a LossShare over the whole batch."""
    negatives = [] if fresh.negative_texts is None else [fresh.negative_texts]
    leaves = [t.clone().requires_grad_() for t in (fresh.image_embeds, fresh.text_embeds, scale, bias, *negatives)]
    pairs = Pairs(leaves[0], leaves[1], *fresh.ids, *leaves[4:])
    value = naive(pairs, remembered, *leaves[2:4], **options)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return LossShare(
        value.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)),
    )


GRADIENTS = ("loss", "image_embeds", "text_embeds", "logit_scale", "logit_bias", "negative_texts")


def assert_same(share: LossShare, twin: LossShare, tolerance: float = 1e-12) -> None:
    for name in GRADIENTS:
        value = getattr(share, name)
        expected = getattr(twin, name)
        assert (value is None) == (expected is None), name
        if value is None:
            continue
        error = (value - expected).abs().max() / expected.abs().max().clamp(min=1e-3)  # a zero is compared absolutely
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def remembered_pairs(groups: int | None, fresh: Pairs, texts: int | None = None) -> Pairs:
    """Old pairs of which some are stale copies of fresh samples, and some only share a group."""
    old = random_pairs(12, DIM, seed=9, groups=groups, first_id=100, texts=texts)
    group, sample_id, text_id = old.group.clone(), old.sample_id.clone(), old.text_id.clone()
    group[:4], sample_id[:4], text_id[:4] = fresh.group[3:7], fresh.sample_id[3:7], fresh.text_id[3:7]
    group[4:6] = fresh.group[7:9]
    return replace(old, group=group, sample_id=sample_id, text_id=text_id)


def normalizers_of(old: Pairs, scale: float) -> dict[str, torch.Tensor]:
    """The normalizers that InfoNCE gives these pairs at this scale."""
    numbers = torch.tensor([scale, 0.0], dtype=old.image_embeds.dtype)
    share = infonce(old, None, *numbers, slice(0, len(old)))
    return {name: getattr(share, name) for name in ("image_normalizer", "text_normalizer")}


SCALE, BIAS = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
CASES = [
    (infonce, naive_infonce, {}),
    (infonce, naive_infonce, {"label_smoothing": 0.1}),
    (sigmoid, naive_sigmoid, {}),
    (sigmoid, naive_sigmoid, {"pos_weight": 3.0}),
    (sigmoid, naive_sigmoid, {"pos_weight": "balanced"}),
]


@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(("loss", "naive", "options"), CASES)
def test_value_and_gradients_equal_a_double_loop(loss, naive, options, memory, groups):
    fresh = random_pairs(17, DIM, seed=1, groups=groups)
    remembered = remembered_pairs(groups, fresh) if memory else None
    share = loss(fresh, remembered, SCALE, BIAS, slice(0, 17), **options)
    assert_same(share, autograd(naive, fresh, remembered, SCALE, BIAS, **options))


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(("loss", "naive", "options"), CASES)
def test_with_negative_texts_too(loss, naive, options, memory):
    fresh = random_pairs(17, DIM, seed=1, groups=4)
    fresh = replace(fresh, negative_texts=random_pairs(9, DIM, seed=2).text_embeds)
    remembered = remembered_pairs(4, fresh) if memory else None
    share = loss(fresh, remembered, SCALE, BIAS, slice(0, 17), **options)
    assert_same(share, autograd(naive, fresh, remembered, SCALE, BIAS, **options))
    without = loss(replace(fresh, negative_texts=None), remembered, SCALE, BIAS, slice(0, 17), **options)
    assert share.loss > 1.01 * without.loss


@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("same_text", ["exclude", "positive", "negative"])
@pytest.mark.parametrize(("loss", "naive", "options"), CASES)
def test_equal_texts_of_other_groups_count_as_asked(loss, naive, options, same_text, memory, groups):
    """In one batch and in the slices of four ranks; were all texts distinct, the loss would be another."""
    fresh = random_pairs(17, DIM, seed=1, groups=groups, texts=6)
    fresh = replace(fresh, negative_texts=random_pairs(3, DIM, seed=2).text_embeds)
    remembered = remembered_pairs(groups, fresh, texts=6) if memory else None
    options = options | {"same_text": same_text}
    twin = autograd(naive, fresh, remembered, SCALE, BIAS, **options)
    whole = loss(fresh, remembered, SCALE, BIAS, slice(0, 17), **options)
    assert_same(whole, twin)
    assert_same(
        over_slices(loss, options, fresh, remembered, [slice(0, 5), slice(5, 6), slice(6, 14), slice(14, 17)]), twin
    )
    distinct = loss(replace(fresh, text_id=torch.arange(17)), remembered, SCALE, BIAS, slice(0, 17), **options)
    moved = (distinct.image_embeds - whole.image_embeds).abs().max() / whole.image_embeds.abs().max()
    assert moved == 0 if same_text == "negative" else moved > 0.01


@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_with_distinct_texts_there_is_nothing_to_exclude(loss):
    fresh = random_pairs(17, DIM, seed=1, groups=4)
    exclude, negative = (loss(fresh, None, SCALE, BIAS, slice(0, 17), same_text=way) for way in ("exclude", "negative"))
    assert_same(exclude, negative, tolerance=0)


@pytest.mark.parametrize("same_text", ["exclude", "positive", "negative"])
@pytest.mark.parametrize("positives", ["group", "pair"])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    ("loss", "dense", "options"),
    [
        (infonce, dense_infonce, {"label_smoothing": 0.1}),
        (infonce, dense_infonce, {}),
        (sigmoid, dense_sigmoid, {"pos_weight": "balanced"}),
    ],
)
def test_the_dense_twins_of_verify_gradients_equal_the_losses(loss, dense, options, extras, positives, same_text):
    """With negative texts and a memory too; in tiles of any size."""
    objective = Objective("clip", partial(loss, **options), partial(dense, **options)).of_run(positives, same_text)
    fresh, remembered = random_pairs(17, DIM, seed=1, groups=4, texts=6), None
    if extras:
        fresh = replace(fresh, negative_texts=random_pairs(3, DIM, seed=2).text_embeds)
        remembered = remembered_pairs(4, fresh, texts=6)
    twin = autograd(objective.dense, fresh, remembered, SCALE, BIAS)
    if loss is infonce:  # whose value does not feel the bias
        twin = replace(twin, logit_bias=torch.zeros_like(BIAS))
    for tile in (3, 100):
        assert_same(objective.loss(fresh, remembered, SCALE, BIAS, slice(0, 17), tile=tile), twin)


@pytest.mark.parametrize(("loss", "dense"), [(infonce, dense_infonce), (sigmoid, dense_sigmoid)])
def test_the_dense_twins_give_each_rank_negative_texts_of_its_own(loss, dense):
    fresh = random_pairs(16, DIM, seed=1, groups=4)
    of_ranks = random_pairs(6, DIM, seed=2).text_embeds.unflatten(0, (2, 3))
    value = dense(replace(fresh, negative_texts=of_ranks), None, SCALE, BIAS)
    options = {"merge_logsumexp": partial_column_merger({}, fresh, None, [slice(0, 16)])} if loss is infonce else {}
    shares = [
        loss(replace(fresh, negative_texts=own), None, SCALE, BIAS, slice(8 * rank, 8 * rank + 8), **options).loss
        for rank, own in enumerate(of_ranks)
    ]
    assert sum(shares).item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_shares_of_row_slices_add_up_to_the_whole_batch(loss):
    fresh = random_pairs(17, DIM, seed=1, groups=4)
    fresh = replace(fresh, negative_texts=random_pairs(9, DIM, seed=2).text_embeds)
    remembered = remembered_pairs(4, fresh)
    whole = loss(fresh, remembered, SCALE, BIAS, slice(0, 17))
    assert_same(over_slices(loss, {}, fresh, remembered, [slice(0, 5), slice(5, 14), slice(14, 17)]), whole)


@pytest.mark.parametrize("same_text", ["exclude", "positive", "negative"])
@pytest.mark.parametrize("loss", [infonce, partial(infonce, label_smoothing=0.1), sigmoid])
def test_a_share_without_rows_contributes_nothing(loss, same_text):
    """A rank without pairs: validation may have fewer pairs than ranks."""
    fresh = random_pairs(17, DIM, seed=1, groups=4, texts=6)
    fresh = replace(fresh, negative_texts=random_pairs(9, DIM, seed=2).text_embeds)
    for remembered in (None, remembered_pairs(4, fresh, texts=6)):
        for rows in (slice(17, 17), slice(0, 0)):
            share = loss(fresh, remembered, SCALE, BIAS, rows, same_text=same_text)
            found = [getattr(share, name) for name in GRADIENTS]
            assert [tuple(value.shape) for value in found] == [(), (0, DIM), (17, DIM), (), (), (9, DIM)]
            assert all(value.eq(0).all() for value in found)


def over_slices(loss, options: dict, fresh, remembered, slices: list[slice]) -> LossShare:
    """The shares of several ranks, added up."""
    if loss is not sigmoid:
        options = options | {"merge_logsumexp": partial_column_merger(options, fresh, remembered, slices)}
    shares = [loss(fresh, remembered, SCALE, BIAS, rows, **options) for rows in slices]
    return LossShare(
        sum(s.loss for s in shares),
        torch.cat([s.image_embeds for s in shares]),
        sum(s.text_embeds for s in shares),
        sum(s.logit_scale for s in shares),
        sum(s.logit_bias for s in shares),
        sum(s.negative_texts for s in shares),
    )


def partial_column_merger(options: dict, fresh, remembered, slices):
    """Exchange of the ranks: the log-sum-exp over the partial ones of all slices."""
    calls: list[list[torch.Tensor]] = []
    for rows in slices:
        calls.append([])
        infonce(fresh, remembered, SCALE, BIAS, rows, merge_logsumexp=lambda x: calls[-1].append(x) or x, **options)
    merged = cycle([torch.stack(partials).logsumexp(0) for partials in zip(*calls, strict=True)])
    return lambda partial: next(merged)


def test_negative_control_stale_copies_matter():
    """Were remembered copies of the same sample not left out, the value would differ."""
    fresh = random_pairs(17, DIM, seed=1, groups=4)
    remembered = remembered_pairs(4, fresh)
    unmasked = replace(remembered, sample_id=remembered.sample_id + 1000)
    for loss, naive in ((infonce, naive_infonce), (sigmoid, naive_sigmoid)):
        twin = autograd(naive, fresh, remembered, SCALE, BIAS)
        wrong = loss(fresh, unmasked, SCALE, BIAS, slice(0, 17))
        assert abs(wrong.loss - twin.loss) / twin.loss > 1e-3


@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_low_precision_embeddings_are_computed_in_float32(loss):
    fresh = random_pairs(17, DIM, seed=1)
    half = replace(fresh, image_embeds=fresh.image_embeds.bfloat16(), text_embeds=fresh.text_embeds.bfloat16())
    exact = replace(fresh, image_embeds=half.image_embeds.double(), text_embeds=half.text_embeds.double())
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    share = loss(half, None, scale, bias, slice(0, 17))
    assert share.image_embeds.dtype == torch.float32
    assert_same(share, loss(exact, None, scale.double(), bias.double(), slice(0, 17)), tolerance=1e-4)


def learnt(count: int, classes: int, spread: float) -> Pairs:
    """Pairs near the direction of their class, in float32; up to 32 classes are orthogonal."""
    pairs, group = random_pairs(count, 32, seed=1), torch.arange(count) % classes
    centres = random_pairs(classes, 32, seed=2).image_embeds if classes > 32 else torch.eye(32, dtype=torch.float64)
    sums = (centres[group] + spread * embeds for embeds in (pairs.image_embeds, pairs.text_embeds))
    embeds = (torch.nn.functional.normalize(each, dim=1).float() for each in sums)
    return Pairs(*embeds, group, pairs.sample_id, pairs.text_id)


def doubled(pairs: Pairs) -> Pairs:
    return replace(pairs, image_embeds=pairs.image_embeds.double(), text_embeds=pairs.text_embeds.double())


@pytest.mark.parametrize("pos_weight", [1.0, "balanced"])
@pytest.mark.parametrize("classes", [512, 100, 10, 2, 1])
def test_sigmoid_in_float32_is_within_1e_5_of_float64(classes, pos_weight, monkeypatch):
    """From 1 to N positives, for a fresh and a learnt model."""
    monkeypatch.setattr(logit_tiles, "TILE", 200)
    for spread in (3.0, 0.1):
        fresh = learnt(512, classes, spread)
        for scale in (1.0, 30.0, 100.0):
            for bias in (0.0, -15.0, -30.0):
                numbers = torch.tensor(scale), torch.tensor(bias)
                share = sigmoid(fresh, None, *numbers, slice(0, 512), pos_weight=pos_weight)
                exact = (number.double() for number in numbers)
                twin = sigmoid(doubled(fresh), None, *exact, slice(0, 512), pos_weight=pos_weight)
                for name in ("loss", "image_embeds", "text_embeds", "logit_scale", "logit_bias"):
                    ours, expected = getattr(share, name), getattr(twin, name)
                    largest = expected.abs().max().clamp(min=1e-30)  # below, float32 itself runs out of digits
                    assert (ours - expected).abs().max() <= 1e-5 * largest, (name, spread, scale, bias)


def test_negative_control_softplus_as_a_difference_loses_its_digits():
    """softplus(-S) as softplus(S) - S, which the sum over a class allows, in tiles that add up in float32."""
    scale, bias, count = 30.0, -15.0, 2048
    fresh = learnt(count, 10, 0.2)
    share = sigmoid(fresh, None, torch.tensor(scale), torch.tensor(bias), slice(0, count), tile=512)
    exact = doubled(fresh)
    numbers = (torch.tensor(number, dtype=torch.float64) for number in (scale, bias))
    twin = sigmoid(exact, None, *numbers, slice(0, count), tile=512)
    images, texts, group = fresh.image_embeds, fresh.text_embeds, fresh.group
    logits = scale * images @ texts.T + bias
    sums = torch.zeros(10, 32).index_add_(0, group, texts)[group]
    positives = torch.bincount(group)[group].float()
    linear = (sums * images).sum() * scale + positives.sum() * bias
    softplus = torch.logaddexp(logits, torch.zeros(())).sum()
    slope = logits.sigmoid() @ texts - sums
    apart = LossShare((softplus - linear) / count, slope * scale / count, *[torch.zeros(())] * 3)
    for name in ("loss", "image_embeds"):
        errors = [(getattr(each, name) - getattr(twin, name)).abs().max() for each in (share, apart)]
        ours, old = (error / getattr(twin, name).abs().max() for error in errors)
        assert ours <= 1e-5 and old > 1e-2, name


def test_two_pairs_of_ids_are_not_mixed_up():
    """Ids whose group * -7046029254386353131 + sample is one number: an other of neither is no stale copy."""
    factor = -7046029254386353131
    fresh = random_pairs(6, DIM, seed=1, groups=2)
    old = random_pairs(6, DIM, seed=2, first_id=100)
    sample = (fresh.sample_id - factor).long()
    assert torch.equal(fresh.group * factor + fresh.sample_id, (fresh.group + 1) * factor + sample)
    for offset in (1, 0):  # the group of another anchor or of none, and such a sample
        remembered = replace(old, group=fresh.group + offset, sample_id=sample)
        for loss, naive in ((infonce, naive_infonce), (sigmoid, naive_sigmoid)):
            for way in ("exclude", "positive"):
                twin = autograd(naive, fresh, remembered, SCALE, BIAS, same_text=way)
                assert_same(loss(fresh, remembered, SCALE, BIAS, slice(0, 6), same_text=way), twin)


@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_large_groups_in_float32_stay_near_float64(loss):
    """With 150 positives, nearly fitted, little is lost."""
    fresh = random_pairs(300, DIM, seed=1, groups=2)
    centre = torch.eye(DIM, dtype=torch.float64)[fresh.group]
    near = lambda embeds: torch.nn.functional.normalize(centre + 0.3 * embeds, dim=1)  # noqa: E731
    exact = replace(fresh, image_embeds=near(fresh.image_embeds), text_embeds=near(fresh.text_embeds))
    single = replace(exact, image_embeds=exact.image_embeds.float(), text_embeds=exact.text_embeds.float())
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    share = loss(single, None, scale.float(), bias.float(), slice(0, 300))
    assert_same(share, loss(exact, None, scale, bias, slice(0, 300)), tolerance=1e-4)


def test_a_large_scale_does_not_overflow():
    fresh = random_pairs(17, DIM, seed=1)
    share = infonce(fresh, None, torch.tensor(5000.0), torch.tensor(0.0), slice(0, 17))
    assert all(torch.isfinite(value).all() for value in vars(share).values() if value is not None)


def test_one_hand_computed_value():
    """Two orthogonal pairs at scale 1: each anchor's softmax is e / (e + 1); sigmoid has two terms of each kind."""
    eye = torch.eye(2, dtype=torch.float64)
    fresh = Pairs(eye, eye, *(torch.arange(2) for _ in range(3)))
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    nce = infonce(fresh, None, one, zero, slice(0, 2)).loss
    assert nce == pytest.approx(torch.log1p(torch.exp(-one)).item())
    pairwise = sigmoid(fresh, None, one, zero, slice(0, 2)).loss
    assert pairwise == pytest.approx((torch.log1p(torch.exp(-one)) + torch.log(torch.tensor(2.0))).item())


def float32_errors(fresh: Pairs, remembered: Pairs | None, scale: float, **options) -> dict[str, float]:
    """Largest differences of InfoNCE in float32 from float64, relative to the largest element."""
    rows, numbers = slice(0, len(fresh)), (torch.tensor(scale), torch.tensor(0.0))
    share = infonce(fresh, remembered, *numbers, rows, **options)
    exact = (None if pairs is None else doubled(pairs) for pairs in (fresh, remembered))
    twin = infonce(*exact, *(number.double() for number in numbers), rows, **options)
    errors = {}
    for name in ("loss", "image_embeds", "text_embeds", "logit_scale"):
        ours, expected = getattr(share, name), getattr(twin, name)
        errors[name] = ((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return errors


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("classes", [32, 10, 2])
def test_infonce_in_float32_is_within_1e_5_of_float64(classes, memory):
    for spread in (3.0, 0.3):
        fresh, old = learnt(512, classes, spread), None
        if memory:
            old = learnt(512, classes, 1.3 * spread)
            old = replace(old, sample_id=old.sample_id + 300)
        for scale in (1.0, 30.0, 100.0):
            old = replace(old, **normalizers_of(old, scale)) if memory else None
            errors = float32_errors(fresh, old, scale, tile=200)
            # Where both towers have learnt the classes, less is left of anchors alone: the rounded logits show more.
            assert max(errors.values()) <= (5e-5 if memory else 1e-5), (spread, scale, errors)


@pytest.mark.parametrize(("spread", "largest"), [(0.3, 1e-4), (0.1, 1e-5), (0.03, 1e-5)])
def test_infonce_of_pairs_that_are_nearly_perfect_keeps_its_digits_in_float32(spread, largest):
    """Losses from 3e-5 down to 1e-17, where 1 - p of a positive is far below what float32 resolves next to 1."""
    fresh = learnt(512, 512, spread)
    for scale in (30.0, 100.0):
        assert infonce(fresh, None, torch.tensor(scale), torch.tensor(0.0), slice(0, 512), tile=200).loss < largest
        errors = float32_errors(fresh, None, scale, tile=200)
        assert max(errors.values()) <= 1e-5 * (2 if scale > 30 else 1), (scale, errors)


def test_negative_control_p_less_target_in_float32_loses_its_digits():
    fresh, count, scale = learnt(512, 512, 0.1), 512, 30.0
    exact = infonce(doubled(fresh), None, *(torch.tensor(x).double() for x in (scale, 0.0)), slice(0, count), tile=200)
    logits = scale * fresh.image_embeds @ fresh.text_embeds.T
    slope = logits.softmax(1) + logits.softmax(0) - 2 * torch.eye(count)
    plain = slope @ fresh.text_embeds * scale / (2 * count)
    assert (plain - exact.image_embeds).abs().max() > 1e-3 * exact.image_embeds.abs().max()


@pytest.mark.parametrize("classes", [32, 10, 2])
def test_what_infonce_loses_on_tight_classes_is_the_rounding_of_its_logits(classes):
    """Logits near 100 that differ by 0.2 have lost digits before the loss; it adds next to nothing to that."""
    fresh, scale, count = learnt(512, classes, 0.1), 100.0, 512
    assert max(float32_errors(fresh, None, scale, tile=200).values()) <= 1e-4
    share = infonce(fresh, None, torch.tensor(scale), torch.tensor(0.0), slice(0, count), tile=count)
    logits = ((fresh.image_embeds * scale) @ fresh.text_embeds.T).double()  # as float32 rounds them
    positive = (fresh.group[:, None] == fresh.group).double()
    slope = logits.softmax(1) + logits.softmax(0) - 2 * positive / positive.sum(1, keepdim=True)
    expected = slope @ fresh.text_embeds.double() * scale / (2 * count)
    assert (share.image_embeds - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("order", ["rising", "falling", "drawn"])
@pytest.mark.parametrize("all_excluded", [False, True])
def test_softmax_over_tiles_at_any_range_of_logits(order, all_excluded):
    """In float32 at the largest scale, whichever tile holds what dominates; a memory may have no candidate at all."""
    generator = torch.Generator().manual_seed(3)
    fresh, old = random_pairs(9, DIM, seed=1), random_pairs(27, DIM, seed=2, first_id=100)
    by_cosine = (old.text_embeds @ fresh.image_embeds[0]).argsort(descending=order == "falling")
    if order != "drawn":
        old = replace(old, text_embeds=old.text_embeds[by_cosine], image_embeds=old.image_embeds[by_cosine])
    stale = torch.rand(27, generator=generator) < 0.3
    old = replace(old, sample_id=torch.where(stale, torch.arange(27) % 9, old.sample_id))
    if all_excluded:
        fresh, old = replace(fresh, text_id=torch.zeros(9).long()), replace(old, text_id=torch.zeros(27).long())
    old = replace(old, **normalizers_of(old, 100.0))
    single = (replace(p, image_embeds=p.image_embeds.float(), text_embeds=p.text_embeds.float()) for p in (fresh, old))
    options = {"same_text": "exclude"}
    share = infonce(*single, torch.tensor(100.0), torch.tensor(0.0), slice(0, 9), tile=7, **options)
    scale = torch.tensor(100.0, dtype=torch.float64)
    twin = autograd(naive_infonce, fresh, old, scale, torch.zeros_like(scale), **options)
    for name in ("loss", "image_embeds", "text_embeds", "logit_scale"):
        torch.testing.assert_close(getattr(share, name).double(), getattr(twin, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("same_text", ["exclude", "positive", "negative"])
@pytest.mark.parametrize("loss", [partial(infonce, label_smoothing=0.1), infonce, sigmoid])
def test_masks_that_hold_nothing_change_nothing(loss, same_text, monkeypatch):
    """Were the masks of every tile computed, though its anchors and others have no id in common."""
    fresh = random_pairs(17, DIM, seed=1, groups=9, texts=9)
    fresh = replace(fresh, negative_texts=random_pairs(9, DIM, seed=2).text_embeds)
    remembered = remembered_pairs(9, fresh, texts=9)
    found = loss(fresh, remembered, SCALE, BIAS, slice(0, 17), same_text=same_text, tile=3)

    def everywhere(anchors, others, which, side):
        table = positives.ids_in_common(anchors, others, which, side)
        return torch.tensor(which)[:, None, None].expand_as(table)

    monkeypatch.setattr(logit_tiles, "ids_in_common", everywhere)
    assert_same(loss(fresh, remembered, SCALE, BIAS, slice(0, 17), same_text=same_text, tile=3), found)


def test_the_table_names_the_tiles_that_have_an_id_in_common():
    """Of a rank's rows, whose tiles begin with the rows."""
    fresh = random_pairs(17, DIM, seed=1, groups=30, texts=30)
    own, old = fresh.ids.rows(slice(4, 15)), remembered_pairs(30, fresh, texts=30).ids
    table = positives.ids_in_common(own, old, (True, True, True), 4)
    assert table.shape == (3, 3, 3) and 0 < table.sum() < table.numel()
    for k, r, c in product(range(3), repeat=3):
        ids, others = own[k][4 * r : 4 * r + 4].tolist(), old[k][4 * c : 4 * c + 4].tolist()
        assert table[k, r, c] == (not set(ids).isdisjoint(others))
    assert not positives.ids_in_common(own, old, (True, False, True), 4)[1].any()


@pytest.mark.parametrize(
    ("kind", "of_memory"),
    [("group", False), ("text_id", False), ("group", True), ("text_id", True), ("sample_id", True)],
)
@pytest.mark.parametrize(("loss", "naive"), [(infonce, naive_infonce), (sigmoid, naive_sigmoid)])
def test_an_id_that_one_pair_of_tiles_shares_counts(loss, naive, kind, of_memory, monkeypatch):
    """Negative control: with a table that misses this pair of tiles, the loss is another."""
    fresh, old = random_pairs(17, DIM, seed=1), random_pairs(12, DIM, seed=9, first_id=100)
    shared = getattr(old if of_memory else fresh, kind).clone()
    shared[11] = 2  # rows 0 to 3 and columns 8 to 11
    fresh, old = (fresh, replace(old, **{kind: shared})) if of_memory else (replace(fresh, **{kind: shared}), old)
    run = partial(loss, fresh, old, SCALE, BIAS, slice(0, 17), same_text="exclude", tile=4)
    twin = autograd(naive, fresh, old, SCALE, BIAS, same_text="exclude")
    assert_same(run(), twin)

    def misses_one(anchors, others, which, side):
        table = positives.ids_in_common(anchors, others, which, side)
        if which[1] == of_memory:
            name = Ids._fields.index(kind)
            assert table[name, 0, 2]
            table[name, 0, 2] = False
        return table

    monkeypatch.setattr(logit_tiles, "ids_in_common", misses_one)
    with pytest.raises(AssertionError, match="loss: relative error"):
        assert_same(run(), twin)
