"""Evaluation: metrics equal naive twins for any number of ranks, and bad samples are reported."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from small_evaluation import (
    PIPELINE,
    SmallTowers,
    captioned,
    classed,
    small_processing,
    small_tokenize,
    unit,
)
from torch import Tensor

from lib.data.evaluation_set import limited
from lib.data.prepare import text_key
from lib.distributed import gather_objects, logsumexp_over_ranks
from lib.errors import InputError
from lib.evaluation import validation
from lib.evaluation.classification import class_embeddings, zeroshot_metrics
from lib.evaluation.embed import embed_images, embed_texts
from lib.evaluation.report import aligned, write_report
from lib.evaluation.retrieval_ranks import retrieval_metrics
from lib.evaluation.validation import validate
from lib.losses import infonce, sigmoid
from lib.train import _validation_loss

# Faults


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_embeddings_are_an_error_not_a_score(value):
    good, broken = unit(6, 4), unit(6, 4)
    broken[2, 1] = value
    for images, texts in ((good, broken), (broken, good)):
        with pytest.raises(InputError, match="1 of 6 (image|text|class) embeddings are NaN"):
            retrieval_metrics(images, texts, torch.arange(6))
        with pytest.raises(InputError, match="1 of 6 (image|text|class) embeddings are NaN"):
            zeroshot_metrics(images, np.arange(6), texts, "abcdef")
    towers = SmallTowers()
    with torch.no_grad():
        towers.image[:] = value
        towers.text[:] = value
    with pytest.raises(InputError, match="11 of 11 image embeddings"):
        embed_images(towers, classed(), PIPELINE, device="cpu")
    with pytest.raises(InputError, match="2 of 2 text embeddings"):
        embed_texts(towers, ["a", "b"], small_tokenize, device="cpu")


def test_nothing_to_measure_is_one_clear_error():
    towers = SmallTowers()
    with pytest.raises(InputError, match="small captions holds no images"):
        embed_images(towers, captioned(0), PIPELINE, device="cpu")
    with pytest.raises(InputError, match="none of the 2 images .* can be read .truncated 1, empty 1."):
        embed_images(towers, classed(2, {0: "truncated", 1: "empty"}), PIPELINE, device="cpu")
    with pytest.raises(InputError, match="no texts"):
        embed_texts(towers, [], small_tokenize, device="cpu")
    with pytest.raises(InputError, match="no caption"):
        retrieval_metrics(unit(3, 4), unit(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match="no images"):
        zeroshot_metrics(unit(0, 4), np.zeros(0, dtype=int), unit(2, 4), "ab")
    with pytest.raises(InputError, match="two classes are called 'x y'"):
        class_embeddings(["x y", "z", "x y"], ["{}"], lambda texts: unit(len(texts), 4))


# The embedding pass


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_readable_image_gets_its_own_embedding(batch_size, workers):
    towers, bad = SmallTowers().eval(), {2: "truncated", 7: "missing"}
    data = classed(9, bad)
    found = embed_images(towers, data, PIPELINE, device="cpu", batch_size=batch_size, workers=workers)
    assert found.skipped == [("image 2", "truncated"), ("image 7", "missing")]
    assert found.valid.tolist() == [i not in bad for i in range(9)]
    for i in range(9):
        if i in bad:
            assert found.embeds[i].count_nonzero() == 0
        else:
            with torch.no_grad():
                alone = towers(pixel_values=PIPELINE(data.open_image(i), seed=0)[None]).image_embeds[0]
            torch.testing.assert_close(found.embeds[i], alone, rtol=0, atol=1e-6)


def test_each_distinct_text_is_encoded_once():
    towers, encoded = SmallTowers().eval(), []

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded.extend(texts)
        return small_tokenize(texts)

    texts = ["bb", "a", "bb", "a longer one", "a", "c"]
    found = embed_texts(towers, texts, tokenize, device="cpu", batch_size=3)
    assert sorted(encoded) == sorted(set(texts))
    for text, row in zip(texts, found, strict=True):
        ids, mask = small_tokenize([text])
        with torch.no_grad():
            torch.testing.assert_close(row, towers(input_ids=ids, attention_mask=mask).text_embeds[0])


def _embed_all() -> dict[str, Tensor | list]:
    towers = SmallTowers().train()
    found = {}
    for count, bad in ((7, {1: "empty", 4: "truncated"}), (1, {})):
        embedded = embed_images(towers, classed(count, bad), PIPELINE, device="cpu", batch_size=2)
        found |= {f"embeds {count}": embedded.embeds, f"valid {count}": embedded.valid}
        found[f"skipped {count}"] = embedded.skipped
        texts = [f"text {i % 5}" for i in range(count)]
        found[f"texts {count}"] = embed_texts(towers, texts, small_tokenize, device="cpu", batch_size=2)
    found["metrics"] = validate(towers, captioned(), small_processing(), mean_product, device="cpu")
    return found


def _embed_on_every_rank() -> list[dict]:
    return gather_objects(_embed_all())


def mean_product(image_embeds: Tensor, text_embeds: Tensor, group: Tensor, text_id: Tensor) -> dict[str, float]:
    return {"loss": (image_embeds * text_embeds).sum(1).mean().item()}


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives():
    alone = _embed_all()
    loss = alone["metrics"].pop("loss")
    for found in on_ranks(2, _embed_on_every_rank):
        assert found["metrics"].pop("loss") == pytest.approx(loss, abs=1e-6)
        assert list(found) == list(alone)
        for name, value in alone.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
            else:
                assert found[name] == value


def _validated(count: int) -> list[float]:
    """The loss of a validation on so many pairs, by both losses, as training has it."""
    towers = SmallTowers().eval()
    towers.logit_scale, towers.logit_bias = torch.tensor(2.0), torch.tensor(-1.0)
    losses = {"clip": partial(infonce, merge_logsumexp=logsumexp_over_ranks), "siglip": sigmoid}
    of_pairs = (partial(_validation_loss, towers, loss, family) for family, loss in losses.items())
    return [validate(towers, captioned(count), small_processing(), each, device="cpu")["loss"] for each in of_pairs]


@pytest.mark.slow
def test_more_ranks_than_validation_pairs_give_what_one_process_gives():
    assert on_ranks(4, _validated, 3) == pytest.approx(_validated(3), rel=1e-5)


# Validation


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("data", [classed(), captioned()], ids=["classes", "captions"])
def test_validation_leaves_modes_and_random_state_alone(training, data):
    towers = SmallTowers()
    towers.dropout.train(training)
    modes = [module.training for module in towers.modules()]
    random_state = torch.get_rng_state()
    arguments = (towers, data, small_processing(), mean_product)
    first = validate(*arguments, device="cpu")
    assert [module.training for module in towers.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert validate(*arguments, device="cpu") == first, "dropout must be off"
    assert all(parameter.grad is None for parameter in towers.parameters())

    towers.image = None  # a fault on the way
    with pytest.raises(TypeError):
        validate(*arguments, device="cpu")
    assert [module.training for module in towers.modules()] == modes


def test_validation_pairs_classes_with_the_first_template():
    towers, data, seen = SmallTowers().eval(), classed(11, {3: "empty"}), []
    found = validate(towers, data, small_processing(), lambda *pairs: seen.append(pairs) or {"loss": 1.5}, device="cpu")
    assert set(found) == {"accuracy", "macro_f1", "loss"} and found["loss"] == 1.5
    ((image_embeds, text_embeds, group, text_id),) = seen
    kept = [i for i in range(11) if i != 3]
    assert group.tolist() == text_id.tolist() == [i % 3 for i in kept]
    embeds = embed_images(towers, data, PIPELINE, device="cpu").embeds
    torch.testing.assert_close(image_embeds, embeds[kept])
    prompts = [f"a {data.classes[i % 3]}" for i in kept]
    torch.testing.assert_close(text_embeds, embed_texts(towers, prompts, small_tokenize, device="cpu"))


def test_validation_pairs_images_with_their_first_caption(monkeypatch):
    towers, data, seen = SmallTowers().eval(), captioned(9, {2: "empty"}), []
    found = validate(towers, data, small_processing(), lambda *pairs: seen.append(pairs) or {"loss": 0.0}, device="cpu")
    assert set(found) == {"image_to_text", "text_to_image", "loss"}
    ((image_embeds, text_embeds, group, text_id),) = seen
    kept = [i for i in range(9) if i != 2 and i % 3]
    assert group.tolist() == [100 + i for i in kept]
    firsts = [data.captions[data.caption_image.tolist().index(i)] for i in kept]
    assert text_id.tolist() == [text_key(text) for text in firsts]
    torch.testing.assert_close(text_embeds, embed_texts(towers, firsts, small_tokenize, device="cpu"))
    embeds = embed_images(towers, data, PIPELINE, device="cpu").embeds
    torch.testing.assert_close(image_embeds, embeds[kept])

    monkeypatch.setattr(validation, "LOSS_PAIRS", 2)
    validate(towers, data, small_processing(), lambda *pairs: seen.append(pairs) or {"loss": 0.0}, device="cpu")
    assert seen[1][2].tolist() == [100 + kept[0], 100 + kept[-1]], "the first and the last, evenly spaced"


def test_validation_of_real_towers_on_the_digits():
    from lib.data.sources import open_sources
    from lib.towers import build_preset

    source, data = open_sources("digits", None, None)
    towers, processing = build_preset("tiny-siglip", source.sample_texts(), use_bias=True)
    towers.train()
    found = validate(towers, limited(data, 60), processing, mean_product, device="cpu", workers=1)
    assert 0 <= found["accuracy"] <= 0.5 and 0 <= found["macro_f1"] <= 0.5 and -1 <= found["loss"] <= 1
    assert towers.training


# A sample of the data


def test_a_limited_set_keeps_images_labels_and_captions_together():
    data = captioned(20)
    part = limited(data, 6)
    assert len(part) == 6 and len(part.image_keys) == 6
    numbers = [data.image_keys.index(key) for key in part.image_keys]
    assert part.group.tolist() == data.group[numbers].tolist()
    expected = [(c, i) for c, i in zip(data.captions, data.caption_image, strict=True) if i in numbers]
    found = [(c, numbers[i]) for c, i in zip(part.captions, part.caption_image, strict=True)]
    assert found == expected
    assert np.array_equal(part.open_image(3), data.open_image(numbers[3]))
    classes = limited(classed(300), 30)
    assert set(np.bincount(classes.labels)) <= set(range(8, 13)), "an even spacing meets every class"
    assert limited(data, 20) is data


# Plots and report


def test_the_report_is_one_file_that_loads_nothing(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    tables = {"Figures": [["", "R@1"], ["<script>", "0.5"]]}
    write_report(tmp_path / "r.html", "A & B", {"data": "<b>"}, tables, {"One": tmp_path / "a.png"})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page and "<script" not in page and "A &amp; B" in page and "&lt;b&gt;" in page
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 1
    assert "http" not in page and "href" not in page


def test_tables_are_aligned():
    assert aligned([["", "R@1", "MRR"], ["image to text", "0.5", "12.25"]]) == (
        "               R@1    MRR\nimage to text  0.5  12.25"
    )
