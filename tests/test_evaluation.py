"""Evaluation: figures equal naive twins, any number of ranks gives the same, and nothing broken hides."""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from sklearn import metrics as sk
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.collectives import gather_objects
from lib.data.evaluation_set import EvaluationSet
from lib.data.images import BadImage
from lib.data.pipeline import ImagePipeline
from lib.errors import InputError
from lib.evaluation import plots, retrieval, validation
from lib.evaluation.embed import embed_images, embed_texts
from lib.evaluation.html import aligned, write_report
from lib.evaluation.pictures import Picture, retrieval_pictures, zeroshot_pictures
from lib.evaluation.retrieval import keep_readable, retrieval_metrics
from lib.evaluation.subset import limited
from lib.evaluation.validation import validate
from lib.evaluation.zeroshot import class_embeddings, zeroshot_metrics
from lib.processing import Processing

PIPELINE = ImagePipeline(4)


# Towers and images small enough to see through.


class Output(NamedTuple):
    image_embeds: Tensor | None
    text_embeds: Tensor | None


class SmallTowers(nn.Module):
    """A linear map of pixels and one of the characters of a text, with dropout while training."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(48, 8, generator=generator))
        self.text = nn.Parameter(torch.randn(128, 8, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Sequential(nn.Dropout(0.5)).eval()

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None) -> Output:
        if pixel_values is not None:
            flat = pixel_values.flatten(1).float() / 255
            return Output(self._embeds(flat @ self.image), None)
        characters = nn.functional.one_hot(input_ids, 128).float() * attention_mask[..., None]
        return Output(None, self._embeds(characters.sum(1) @ self.text))

    def _embeds(self, pooled: Tensor) -> Tensor:
        return nn.functional.normalize(self.frozen(self.dropout(pooled)), dim=1)


class SmallImages:
    """Random pictures, drawn by number; some cannot be read."""

    def __init__(self, count: int, bad: dict[int, str]):
        self.keys, self.bad = [f"image {i}" for i in range(count)], bad

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent=None) -> Image.Image:
        if index in self.bad:
            raise BadImage(self.bad[index])
        pixels = np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def small_tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[ord(letter) for letter in text.ljust(longest)] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return ids, mask


def small_processing() -> Processing:
    class Small(Processing):
        def tokenize(self, texts):
            return small_tokenize(texts)

    return Small(None, 64, "longest", False, 4, (0.0,) * 3, (1.0,) * 3, "crop")


def captioned(count: int = 7, bad: dict[int, str] | None = None) -> EvaluationSet:
    """Image i has i % 3 captions, some of them in words that other images' captions use too."""
    images = [i for i in range(count) for _ in range(i % 3)]
    return EvaluationSet(
        name="small captions",
        images=SmallImages(count, bad or {}),
        group=np.arange(count) + 100,
        captions=[f"a caption {i % 4}" for i in range(len(images))],
        caption_image=np.array(images),
    )


def classed(count: int = 11, bad: dict[int, str] | None = None) -> EvaluationSet:
    return EvaluationSet(
        name="small classes",
        images=SmallImages(count, bad or {}),
        group=np.arange(count) % 3,
        labels=np.arange(count) % 3,
        classes=("ant", "bee", "cat", "no pictures"),
        templates=("a {}", "the photo of a {}"),
    )


def unit(*shape: int, seed: int = 0) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


# Retrieval


def naive_ranks(queries: Tensor, candidates: Tensor, is_right, beats=np.greater_equal) -> list[int]:
    """The rank of each query's best right candidate, by two loops."""
    queries, candidates = queries.double().numpy(), candidates.double().numpy()
    ranks = []
    for q in range(len(queries)):
        similarity = [np.float32(sum(queries[q] * candidates[c])) for c in range(len(candidates))]
        right = [c for c in range(len(candidates)) if is_right(q, c)]
        if right:
            best = max(similarity[c] for c in right)
            wrong = [c for c in range(len(candidates)) if c not in right]
            ranks.append(1 + sum(bool(beats(similarity[c], best)) for c in wrong))
    return ranks


def naive_summary(ranks: Sequence[int]) -> dict[str, float]:
    summary = {f"R@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
    ordered = sorted(ranks)
    middle = (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]) / 2
    return summary | {"MRR": math.fsum(1 / rank for rank in ranks) / len(ranks), "median_rank": middle}


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
@pytest.mark.parametrize("tied", [False, True])
def test_retrieval_equals_two_loops(monkeypatch, block, tied):
    monkeypatch.setattr(retrieval, "BLOCK_ENTRIES", block)
    images, texts = unit(31, 6), unit(90, 6, seed=1)
    caption_image = torch.randint(0, 31, (90,), generator=torch.Generator().manual_seed(2))
    assert len(caption_image.unique()) < 31, "some image should have no caption"
    texts = nn.functional.normalize(texts + images[caption_image], dim=1)
    if tied:
        images[10:14], texts[::5], texts[1::9] = images[3], texts[7], images[3]
    found = retrieval_metrics(images, texts, caption_image.numpy())
    to_text = naive_ranks(images, texts, lambda q, c: caption_image[c] == q)
    to_image = naive_ranks(texts, images, lambda q, c: caption_image[q] == c)
    assert found == {"image_to_text": naive_summary(to_text), "text_to_image": naive_summary(to_image)}


@pytest.mark.parametrize("dimension", [3, 64, 257])
def test_equal_embeddings_are_no_success(dimension):
    images = unit(1, dimension).repeat(60, 1)
    caption_image = torch.arange(60).repeat_interleave(2)
    found = retrieval_metrics(images, images[caption_image], caption_image)
    for figures in found.values():
        for k in (1, 5, 10):
            assert figures[f"R@{k}"] <= k / 60
    # A rank that only counts what is strictly better would call the same embeddings perfect.
    lenient = naive_ranks(images, images[caption_image], lambda q, c: caption_image[c] == q, np.greater)
    assert naive_summary(lenient)["R@1"] == 1.0


def test_matching_embeddings_are_found_first():
    images = unit(40, 16)
    found = retrieval_metrics(images, images, torch.arange(40))
    for figures in found.values():
        assert figures == {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "MRR": 1.0, "median_rank": 1.0}


def test_retrieval_never_holds_all_similarities(monkeypatch):
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            largest = max(largest, *sizes, 0)
            return result

    monkeypatch.setattr(retrieval, "BLOCK_ENTRIES", 6000)
    images, texts, caption_image = unit(300, 4), unit(900, 4, seed=1), torch.arange(900) % 300
    with Sizes():
        retrieval_metrics(images, texts, caption_image)
    assert 3000 < largest <= 6000 < 300 * 900


def test_unreadable_images_leave_with_their_captions():
    valid = torch.tensor([True, False, True, True])
    images, captions, caption_image = keep_readable(valid, np.array([3, 1, 0, 3, 1, 2]))
    assert images.tolist() == [0, 2, 3]
    assert captions.tolist() == [0, 2, 3, 5]
    assert caption_image.tolist() == [2, 0, 2, 1]


# Zero-shot


@pytest.mark.parametrize(("count", "classes"), [(400, 17), (300, 6), (50, 5), (20, 2)])
def test_zeroshot_figures_are_scikit_learns(count, classes):
    images, class_embeds = unit(count, 9), unit(classes, 9, seed=1)
    labels = np.random.default_rng(0).permutation(np.arange(count) % classes)
    names = [f"class {i}" for i in range(classes)]
    found = zeroshot_metrics(images, labels, class_embeds, names)
    scores = (images @ class_embeds.T).numpy()
    predicted = scores.argmax(1)
    assert found["accuracy"] == sk.accuracy_score(labels, predicted)
    for name, function in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("f1", sk.f1_score),
    ):
        assert found[f"macro_{name}"] == function(labels, predicted, average="macro", zero_division=0)
        per_class = function(labels, predicted, average=None, zero_division=0)
        assert [found["per_class"][c][name] for c in names] == per_class.tolist()
    assert [found["per_class"][c]["support"] for c in names] == np.bincount(labels).tolist()
    assert found["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    top5 = np.mean([label in np.argsort(row)[-5:] for label, row in zip(labels, scores, strict=True)])
    assert found["top5"] == pytest.approx(top5, abs=1e-12)
    assert json.loads(json.dumps(found)) == found


def test_zeroshot_by_hand_with_a_class_without_images():
    # Predictions: a, a, b, b, b for the true a, a, a, b, b; nothing is ever c.
    images = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]])
    found = zeroshot_metrics(images, np.array([0, 0, 0, 1, 1]), torch.eye(3), ["a", "b", "c"])
    assert found["confusion"] == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["accuracy"] == 0.8
    assert found["top5"] == 1.0
    assert found["macro_f1"] == pytest.approx(0.8)
    assert found["macro_recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert list(found) == [
        "accuracy", "top5", "macro_precision", "macro_recall", "macro_f1", "per_class", "confusion"
    ]  # fmt: skip


def test_equal_embeddings_classify_at_chance():
    found = zeroshot_metrics(unit(1, 8).repeat(90, 1), np.arange(90) % 9, unit(1, 8).repeat(9, 1), "abcdefghi")
    assert found["accuracy"] == pytest.approx(1 / 9)
    assert found["top5"] == pytest.approx(5 / 9)


def test_a_class_is_the_mean_direction_of_its_prompts():
    seen = []

    def embed_text(texts: list[str]) -> Tensor:
        seen.extend(texts)
        return unit(len(texts), 5)

    found = class_embeddings(["ant", "bee"], ["a {}", "two {}s", "no {}"], embed_text)
    assert seen == ["a ant", "two ants", "no ant", "a bee", "two bees", "no bee"]
    prompts = unit(6, 5)
    for row, first in zip(found, (0, 3), strict=True):
        mean = (prompts[first] + prompts[first + 1] + prompts[first + 2]) / 3
        torch.testing.assert_close(row, mean / mean.norm())


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
    with pytest.raises(InputError, match="none of the 2 images .* can be read: truncated 1, empty 1"):
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


def mean_product(image_embeds: Tensor, text_embeds: Tensor, group: Tensor) -> float:
    return (image_embeds * text_embeds).sum(1).mean().item()


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
    found = validate(towers, data, small_processing(), lambda *pairs: seen.append(pairs) or 1.5, device="cpu")
    assert set(found) == {"accuracy", "macro_f1", "loss"} and found["loss"] == 1.5
    ((image_embeds, text_embeds, group),) = seen
    kept = [i for i in range(11) if i != 3]
    assert group.tolist() == [i % 3 for i in kept]
    embeds = embed_images(towers, data, PIPELINE, device="cpu").embeds
    torch.testing.assert_close(image_embeds, embeds[kept])
    prompts = [f"a {data.classes[i % 3]}" for i in kept]
    torch.testing.assert_close(text_embeds, embed_texts(towers, prompts, small_tokenize, device="cpu"))


def test_validation_pairs_images_with_their_first_caption(monkeypatch):
    towers, data, seen = SmallTowers().eval(), captioned(9, {2: "empty"}), []
    found = validate(towers, data, small_processing(), lambda *pairs: seen.append(pairs) or 0.0, device="cpu")
    assert set(found) == {"image_to_text", "text_to_image", "loss"}
    ((image_embeds, text_embeds, group),) = seen
    kept = [i for i in range(9) if i != 2 and i % 3]
    assert group.tolist() == [100 + i for i in kept]
    firsts = [data.captions[data.caption_image.tolist().index(i)] for i in kept]
    torch.testing.assert_close(text_embeds, embed_texts(towers, firsts, small_tokenize, device="cpu"))
    embeds = embed_images(towers, data, PIPELINE, device="cpu").embeds
    torch.testing.assert_close(image_embeds, embeds[kept])

    monkeypatch.setattr(validation, "LOSS_PAIRS", 2)
    validate(towers, data, small_processing(), lambda *pairs: seen.append(pairs) or 0.0, device="cpu")
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


# A part of the data


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


@pytest.mark.parametrize("count", [2, 45])
def test_zeroshot_pictures_for_few_and_many_classes(monkeypatch, tmp_path, count):
    for limit, few in (
        ("ANNOTATED_CLASSES", 5),
        ("LABELLED_CLASSES", 20),
        ("MOST_BARS", 30),
        ("BARS_PER_COLUMN", 9),
    ):
        monkeypatch.setattr(plots, limit, few)
    classes = [f"class_{i} of $very <long> names & more" for i in range(count)]
    rng = np.random.default_rng(0)
    labels = np.arange(2 * count) % count
    predicted = np.where(rng.random(2 * count) < 0.7, labels, rng.integers(0, count, 2 * count))
    scores = nn.functional.one_hot(torch.from_numpy(predicted), count).float()
    metrics = zeroshot_metrics(scores, labels, torch.eye(count), classes)
    images = SmallImages(2 * count, {})
    pictures = zeroshot_pictures(tmp_path, metrics, labels, predicted, classes, images.open)
    assert [picture.path.name for picture in pictures] == ["confusion.png", "class_f1.png", "examples.png"]
    for picture in pictures:
        with Image.open(picture.path) as drawn:
            assert max(drawn.size) < 4000 and min(drawn.size) > 100


@pytest.mark.parametrize("count", [1, 20])
def test_retrieval_pictures_for_few_and_many_images(tmp_path, count):
    caption_image = torch.arange(count).repeat(2)
    images, texts = unit(count, 5), unit(2 * count, 5, seed=1)
    captions = [f"caption {i} costs $5, not $6 " * (1 + i % 9) for i in range(2 * count)]
    metrics = retrieval_metrics(images, texts, caption_image)
    pictures = retrieval_pictures(
        tmp_path, metrics, images, texts, captions, caption_image, SmallImages(count, {}).open
    )
    assert len(pictures) == 4
    assert all(picture.path.stat().st_size > 1000 for picture in pictures)


def test_the_report_is_one_file_that_loads_nothing(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    tables = {"Figures": [["", "R@1"], ["<script>", "0.5"]]}
    write_report(tmp_path / "r.html", "A & B", {"data": "<b>"}, tables, [Picture("One", tmp_path / "a.png")])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page and "<script" not in page and "A &amp; B" in page and "&lt;b&gt;" in page
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 1
    assert "http" not in page and "href" not in page


def test_tables_are_aligned():
    assert aligned([["", "R@1", "MRR"], ["image to text", "0.5", "12.25"]]) == (
        "               R@1    MRR\nimage to text  0.5  12.25"
    )
