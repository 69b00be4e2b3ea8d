"""Retrieval: ranks equal those of two loops and of open_clip, ties are no success, and the report shows its answers."""

import csv
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_evaluation import SmallImages, unit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
from lib.backends import Precision
from lib.data import open_evaluation
from lib.evaluation import retrieval
from lib.evaluation import retrieval_ranks as ranking
from lib.evaluation.embed import Embedded, embed_images, embed_texts
from lib.evaluation.retrieval import margins, matched_similarities, unmatched_similarities
from lib.evaluation.retrieval_answers import Gallery, Matched, candidates, examples, free_query, text_query
from lib.evaluation.retrieval_ranks import Side, count_before, keep_readable, retrieval_metrics, retrieval_ranks
from lib.evaluation.subject import Model, StoredEmbeddings, Subject
from lib.evaluation.tasks import DataFlags, Retrieval, RunFlags
from lib.towers import TwoTowers, build_preset


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


@pytest.mark.parametrize("block", [(2, 4, 8), (7, 21, 48), (255, 1020, 2040)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sparse", [0.0, 1.0])
def test_retrieval_equals_two_loops(monkeypatch, block, tied, sparse):
    for name, size in zip(("SLAB", "BAND", "COLUMNS", "SPARSE"), (*block, sparse), strict=True):
        monkeypatch.setattr(ranking, name, size)
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


def test_strict_pairs_count_every_other_pair_as_wrong():
    images, texts = unit(50, 5), unit(50, 5, seed=1)
    images[7] = images[3]  # the same picture in two pairs
    found = retrieval_metrics(images, texts, torch.arange(50))
    to_text = naive_ranks(images, texts, lambda q, c: q == c)
    to_image = naive_ranks(texts, images, lambda q, c: q == c)
    assert found == {"image_to_text": naive_summary(to_text), "text_to_image": naive_summary(to_image)}
    assert min(to_image[3], to_image[7]) >= 2, "a copy ties"


@pytest.mark.parametrize("noise", [1e-7, 1e-6, 1e-5])
def test_near_ties_are_decided_in_double_precision(noise):
    """Vectors so alike that float32 products order them wrongly."""
    images = nn.functional.normalize(unit(1, 512) + noise * unit(200, 512, seed=1), dim=1)
    texts = nn.functional.normalize(unit(1, 512) + noise * unit(200, 512, seed=2), dim=1)
    exact = (images.double() @ texts.double().T).float()
    own = exact.diagonal()
    expected = (exact >= own[:, None]).sum(1), (exact >= own).sum(0)
    found = retrieval_ranks(images, texts, torch.arange(200))
    assert all(map(torch.equal, found, expected))
    rough = images @ texts.T
    assert not torch.equal((rough >= rough.diagonal()[:, None]).sum(1), expected[0]), "float32 alone would do"


@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_both_ways_to_look_again_agree(monkeypatch, dense):
    monkeypatch.setattr(ranking, "DENSE", dense)
    monkeypatch.setattr(ranking, "SPARSE", 1.0)
    test_near_ties_are_decided_in_double_precision(1e-6)
    test_equal_embeddings_are_no_success(64)


def test_a_float32_product_is_off_by_less_than_is_allowed_for():
    for alike in (0.0, 1.0, 10.0):
        rows, columns = (nn.functional.normalize(alike * unit(1, 512) + unit(2000, 512, seed=s), dim=1) for s in (1, 2))
        off = (rows @ columns.T - rows.double() @ columns.double().T).abs().max().item()
        assert 3 * off < ranking.rounding_of_products(rows, columns) < 1e-5


def test_strict_pairs_are_ranked_as_open_clip_ranks_them():
    """Its training loop's figures, on embeddings without ties (it counts those for the model)."""
    peer = pytest.importorskip("open_clip_train.train")
    images, texts = unit(300, 16), unit(300, 16, seed=1)
    texts = nn.functional.normalize(texts + 0.7 * images, dim=1)
    theirs, ours = peer.get_clip_metrics(images, texts, 1.0), retrieval_metrics(images, texts, torch.arange(300))
    for direction, figures in ours.items():
        for k in (1, 5, 10):
            assert figures[f"R@{k}"] == theirs[f"{direction}_R@{k}"]
        assert abs(figures["median_rank"] - theirs[f"{direction}_median_rank"]) <= 0.5, "theirs is rounded down"


def test_marks_of_a_whole_block_do_not_overflow():
    images, texts = unit(1100, 4), unit(2100, 4, seed=1)
    sides = [Side(embeds, np.arange(len(embeds)), np.full(len(embeds), -2.0, np.float32)) for embeds in (images, texts)]
    of_rows, of_columns = count_before(*sides)
    assert (of_rows == 2100).all() and (of_columns == 1100).all()


class InThisThread(ThreadPoolExecutor):
    """Where the test can see what is done."""

    def map(self, work, items):
        return map(work, items)


def test_retrieval_never_holds_all_similarities(monkeypatch):
    largest = 0
    monkeypatch.setattr(ranking, "ThreadPoolExecutor", InThisThread)

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            largest = max(largest, *sizes, 0)
            return result

    for name, size in {"SLAB": 20, "BAND": 80, "COLUMNS": 152}.items():
        monkeypatch.setattr(ranking, name, size)
    monkeypatch.setattr(retrieval, "BLOCK_ENTRIES", 6000)
    images, texts, caption_image = unit(300, 4), unit(900, 4, seed=1), torch.arange(900) % 300
    with Sizes():
        retrieval_metrics(images, texts, caption_image)
        margins(matched_of(images, texts, caption_image))
    assert 80 * 152 <= largest <= 2 * 80 * 152 < 300 * 900


def test_unreadable_images_leave_with_their_captions():
    valid = torch.tensor([True, False, True, True])
    images, captions, caption_image = keep_readable(valid, np.array([3, 1, 0, 3, 1, 2]))
    assert images.tolist() == [0, 2, 3]
    assert captions.tolist() == [0, 2, 3, 5]
    assert caption_image.tolist() == [2, 0, 2, 1]


def matched_of(images: Tensor, texts: Tensor, caption_image: Tensor, open_image=None) -> Matched:
    captions = [f"caption {i} costs $5, not $6 " * (1 + i % 9) for i in range(len(texts))]
    return Matched(images, texts, captions, caption_image, open_image or SmallImages(len(images), {}).open)


# What stands behind the figures


def test_a_margin_is_right_less_best_wrong(monkeypatch):
    images, texts = unit(12, 4), unit(30, 4, seed=1)
    caption_image = torch.randint(0, 11, (30,), generator=torch.Generator().manual_seed(0))
    products, own = images @ texts.T, caption_image == torch.arange(12)[:, None]
    found = margins(matched_of(images, texts, caption_image))
    expected = [
        max(row[mask]) - max(row[~mask]) for row, mask in zip(products.numpy(), own.numpy(), strict=True) if mask.any()
    ]
    assert found["image_to_text"] == pytest.approx(expected, abs=1e-6)
    expected = [
        column[mask][0] - max(column[~mask]) for column, mask in zip(products.T.numpy(), own.T.numpy(), strict=True)
    ]
    assert found["text_to_image"] == pytest.approx(expected, abs=1e-6)
    ranks = retrieval_ranks(images, texts, caption_image)
    for values, of_direction in zip(found.values(), ranks, strict=True):
        assert ((values > 0) == (of_direction == 1).numpy()).all(), "above 0 is rank 1"
    monkeypatch.setattr(retrieval, "MOST_MARGINS", 5)
    assert len(margins(matched_of(images, texts, caption_image))["text_to_image"]) == 5


def test_a_copy_of_the_right_picture_leaves_no_margin():
    images = unit(40, 512)[torch.arange(400) % 40]
    texts = nn.functional.normalize(images + 0.02 * unit(400, 512, seed=1), dim=1)
    found = margins(matched_of(images, texts, torch.arange(400)))["text_to_image"]
    assert (found == 0).all(), "neither above nor below"


def test_unmatched_pairs_are_never_matched_ones():
    images = torch.eye(6)
    caption_image = torch.arange(6).repeat(20)
    matched = matched_of(images, images[caption_image], caption_image)
    assert (matched_similarities(matched) == 1).all()
    drawn = [unmatched_similarities(matched, seed) for seed in (0, 0, 1)]
    assert all((values == 0).all() for values in drawn)
    images, texts = unit(6, 4), unit(120, 4, seed=1)
    matched = matched_of(images, texts, caption_image)
    drawn = [unmatched_similarities(matched, seed) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    assert len(unmatched_similarities(matched_of(images[:1], texts[:2], torch.zeros(2, dtype=torch.int64)), 0)) == 0


def test_the_same_picture_is_shown_once():
    """Rows 0 to 3 are one picture and 4 another; the right one is among the copies."""
    pictures = [0, 0, 0, 0, 4, 5, 6, 7, 8]
    images, texts = nn.functional.normalize(unit(9, 8) + torch.linspace(4, 0, 9)[:, None], dim=1), torch.ones(9, 8)
    texts = nn.functional.normalize(texts, dim=1)
    opened = SmallImages(9, {}).open
    matched = matched_of(images, texts, torch.arange(9), lambda row: opened(pictures[row]))
    order = (images @ texts[0]).argsort(descending=True).tolist()
    found = text_query(matched, Gallery(matched.open_image), 2, 3).found
    shown = [pictures[answer.content] for answer in found]
    assert len(shown) == 5 and len(set(shown)) == 5
    assert shown == list(dict.fromkeys(pictures[row] for row in order))[:5]
    assert [answer.right for answer in found] == [picture == 0 for picture in shown]
    scores_shown = [answer.score for answer in found]
    assert scores_shown == sorted(scores_shown, reverse=True)
    assert len(free_query(matched, Gallery(matched.open_image), "free", texts[0]).found) == 5


def test_examples_run_from_the_best_to_the_worst():
    ranks = torch.tensor([1, 30, 1, 2, 9, 400, 5])
    assert examples(ranks, True, 5) == [0, 2]
    assert examples(ranks, False, 3) == [3, 4, 5]
    assert examples(torch.ones(3, dtype=torch.int64), False, 3) == []


def test_candidates_hold_own_wrong_and_free_texts():
    images, texts = unit(30, 8), unit(60, 8, seed=1)
    matched = matched_of(images, texts, torch.arange(60) % 30)
    found = candidates(matched, 4, ["free"], unit(1, 8, seed=2), 0)
    own = {matched.captions[row] for row in (4, 34)}
    assert {answer.content for answer in found if answer.right} == own
    assert "free" in {answer.content for answer in found} and 8 <= len(found) <= 13
    assert [answer.score for answer in found] == sorted((answer.score for answer in found), reverse=True)
    wrong = ~(matched.caption_image == 4)
    best = matched.captions[int((texts @ images[4]).masked_fill(~wrong, -2).argmax())]
    assert best in {answer.content for answer in found}


# The script


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Small untrained towers."""
    folder = tmp_path_factory.mktemp("model")
    towers, processing = build_preset("tiny-clip", ["a red square", "something blue"], use_bias=False)
    towers.save_pretrained(folder)
    processing.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Eight pictures with three captions each; the first and the last are the same picture."""
    folder = tmp_path_factory.mktemp("captions")
    rng = np.random.default_rng(0)
    with open(folder / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "caption"])
        for i in range(8):
            pixels = np.random.default_rng(0 if i == 7 else i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            rows.writerows([f"{i}.png", f"{word} {i} {rng.integers(100)}"] for word in ("red", "green", "blue"))
    return folder / "captions.csv"


def run(model: Path, data: Path, out: Path, *flags: str) -> tuple[dict, str]:
    """Metrics and the report's page."""
    arguments = ["retrieval", "--model", str(model), "--data", str(data), "--workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "EXAMPLES", 2)
        assert evaluate.main([*arguments, "--cache-dir", str(out / "cache"), "--output-dir", str(out), *flags]) == 0
    return json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()


@pytest.fixture(scope="module")
def plain(model, table, tmp_path_factory) -> tuple[Path, dict]:
    """Files of an evaluation without further flags."""
    out = tmp_path_factory.mktemp("plain")
    return out, run(model, table, out)[0]


def test_the_report_shows_charts_examples_and_queries(model, table, plain, tmp_path, capsys):
    asked = ["--query", "a red square", "something blue", "--image", "3.png", "--seed", "5"]
    metrics, page = run(model, table, tmp_path, *asked)
    assert list(metrics) == ["image_to_text", "text_to_image"]
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    for heading in (
        "Retrieval", "Recall", "Similarity of pairs", "Margins", "One image and candidate captions",
        "Images for your queries", "Text to image, examples that fail", "Image to text, examples that fail",
        "Similarities and margins",
    ):  # fmt: skip
        assert heading in headings
    assert page.count("<img") == len(list(tmp_path.glob("*.png"))) >= 7
    assert "captions: 24" in capsys.readouterr().out
    folder, of_plain = plain
    assert of_plain == metrics and not (folder / "queries.png").exists()
    chart = "candidates.png"
    assert (tmp_path / chart).read_bytes() != (folder / chart).read_bytes(), "another image, and the free texts"


def test_pairs_make_every_other_caption_wrong(model, table, plain, tmp_path, capsys):
    metrics, page = run(model, table, tmp_path, "--pairs")
    assert "pairs: 24, each its own target; an image is in up to 3 of them" in capsys.readouterr().out
    data, device = open_evaluation(str(table), "auto", None), torch.device("cpu")
    loaded = Model.load(str(model), Precision("fp32", device))
    images = embed_images(loaded.towers, data, loaded.pipeline, device=device).embeds[data.caption_image]
    texts = embed_texts(loaded.towers, data.captions, loaded.processing.tokenize, device=device)
    to_text, to_image = naive_ranks(images, texts, int.__eq__), naive_ranks(texts, images, int.__eq__)
    assert metrics == {"image_to_text": naive_summary(to_text), "text_to_image": naive_summary(to_image)}
    assert min(to_image) >= 3 and metrics != plain[1]
    assert "24, each its own target" in page


def test_embeddings_are_kept_for_the_next_time(model, table, tmp_path, capsys, monkeypatch):
    ran = []
    forward = TwoTowers.forward
    monkeypatch.setattr(TwoTowers, "forward", lambda *given, **inputs: ran.append(1) or forward(*given, **inputs))

    def embed(model: Path = model, limit: int | None = None, **others) -> tuple[Tensor, Tensor]:
        examined = DataFlags(data=str(table), limit=limit)
        running = RunFlags(cache_dir=tmp_path / "cache", output_dir=tmp_path, workers=0, **others)
        options = Retrieval(model=str(model), data=examined, run=running)
        subject = Subject.open(options.model, options, torch.device("cpu"), needs="captions")
        ran.clear()
        return subject.embed_images().embeds, subject.embed_texts(subject.data.captions)

    first = embed()
    assert ran and "from an earlier evaluation" not in capsys.readouterr().out
    again = embed(batch_size=3)
    assert all(map(torch.equal, first, again)) and not ran
    told = capsys.readouterr().out
    assert "image embeddings from an earlier evaluation: " in told and "text embeddings from an earlier" in told
    embed(limit=4)
    assert ran, "a sample of the data has other rows"
    embed(other_weights(model, tmp_path / "other"))
    assert len(ran) == 2, "other weights embed both anew"
    for file in (tmp_path / "cache" / "embeddings").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert all(map(torch.equal, first, embed())) and len(ran) == 2, "damaged files are written anew"
    embed()
    assert not ran
    os.utime(table.parent / "2.png", ns=(1, 1))
    embed()
    assert len(ran) == 1, "changed images are embedded anew, and texts are not"


def other_weights(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if weights[name].ndim == 2)
    weights[name][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_cache_that_cannot_be_written_is_told_and_no_fault(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    stored = StoredEmbeddings(tmp_path / "file" / "embeddings")
    assert stored.find("image-0") is None
    stored.keep("image-0", Embedded(unit(2, 3), torch.ones(2, dtype=torch.bool), []))
    assert "embeddings are not stored for later evaluations" in capsys.readouterr().out


def test_what_the_network_withheld_is_not_kept(tmp_path):
    stored, valid = StoredEmbeddings(tmp_path), torch.tensor([True, False])
    for reason, kept in (("unreachable", False), ("truncated", True)):
        stored.keep("image-0", Embedded(unit(2, 3), valid, [("b", reason)]))
        assert (stored.find("image-0") is not None) == kept
    assert stored.find("image-0").skipped == [("b", "truncated")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image", "no.png"], "--image no.png is not in"),
        (["--query", ""], "--query '' is empty"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--split", "val"], "--split val"),
    ],
)
def test_a_fault_of_the_users_is_one_line(model, table, tmp_path, capsys, flags, words):
    arguments = ["retrieval", "--model", str(model), "--data", str(table), "--output-dir", str(tmp_path), *flags]
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("count", [1, 20])
def test_one_image_and_long_captions_are_drawn_too(tmp_path, monkeypatch, count):
    monkeypatch.setattr(retrieval, "EXAMPLES", 2)
    caption_image = torch.arange(count).repeat(2)
    matched = matched_of(unit(count, 5), unit(2 * count, 5, seed=1), caption_image)
    ranks = retrieval_ranks(matched.image_embeds, matched.text_embeds, caption_image)
    name = "a/very/long/name/of/a/picture/" * 3
    similarities = matched_similarities(matched), unmatched_similarities(matched, 0)
    drawn = [
        *retrieval.report_charts(retrieval.summarize_both(*ranks), similarities, margins(matched)),
        retrieval.candidates_chart(matched, 0, name, (), unit(0, 5), 0),
        *retrieval.sheets(matched, *ranks, (), unit(0, 5)),
    ]
    assert len(drawn) >= 6
    for picture in drawn:
        picture.draw(tmp_path / picture.file)
        with Image.open(tmp_path / picture.file) as image:
            assert max(image.size) < 4000 and min(image.size) > 100
