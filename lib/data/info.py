"""The report of --data-info on training and held-out data: counts, texts, sizes and skipped samples."""

import io
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from lib.data import EvaluationSet, IndexedSource, Source, decode_image
from lib.data.fields import shown
from lib.data.images import BadImage, Extent, ImageFiles, read_image_file
from lib.data.load_datasets import RowImages
from lib.data.pairs import Images, MixedSource, fill
from lib.data.shard_images import TarImages
from lib.data.shard_source import Item, ShardSource
from lib.files import without_secrets, write_text

SAMPLED, PICTURED, COLUMNS = 200, 24, 6
"""Images whose headers are read; pairs in the picture, and how many of them in a row."""
INFO, PICTURE = "data_info.json", "data_info.png"
SHARDS, SAMPLES = 4, 400
"""Shards to read from at most, and samples of all of them."""
MOST_CLASSES, MOST_NAMED = 28, 3
_SMALL = Extent(256, "shorter")


class _Pair(NamedTuple):
    open: Callable[[], Image.Image]
    """decodes the image, or raises BadImage"""
    text: str


class _Header(NamedTuple):
    width: int
    height: int
    format: str
    mode: str


def data_info(source: Source, validation: EvaluationSet | None, folder: Path, seed: int = 0) -> None:
    """Print counts and sizes of the data, and write them as data_info.json and 24 random pairs as data_info.png.

    Shards are not read to the end: the figures on their samples are those of a few hundred.
    """
    training = _training_facts(source, seed)
    held_out = None if validation is None else _evaluation_facts(validation, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / INFO, json.dumps({"training": training, "held_out": held_out}, indent=2) + "\n")
    print(*_lines("training", training), *_lines("held out", held_out or {"name": "nothing"}), sep="\n")
    title = f"Random training pairs: {shown(without_secrets(source.where))}"
    _plot(_random_pairs(source, seed), title, folder / PICTURE)
    print(f"written    {folder / INFO} and {folder / PICTURE}")


def _training_facts(source: Source, seed: int) -> dict:
    if isinstance(source, MixedSource):
        weighted = zip(source.weights, source.parts, strict=True)
        parts = [{"weight": round(weight, 4)} | _training_facts(part, seed) for weight, part in weighted]
        return {"name": source.where, "pairs": source.size, "distinct_texts": source.distinct_texts, "parts": parts}
    if isinstance(source, ShardSource):
        return _shard_facts(source, seed)
    assert isinstance(source, IndexedSource)
    facts: dict = {"name": source.where, "pairs": source.size, "images": len(source.images)}
    facts["distinct_texts"] = source.distinct_texts
    if source.templates:
        facts["classes"] = _class_counts(source.first_text // len(source.templates), source.classes or ())
    else:
        # With --captions one a pair has several texts, with all an image has several pairs.
        captions = np.bincount(source.image, weights=source.text_count).astype(int)
        facts |= _caption_facts(captions, source.texts)
    return facts | {"image_headers": _image_headers(source.images, seed), "left_out": _left_out(source.skipped)}


def _evaluation_facts(data: EvaluationSet, seed: int) -> dict:
    facts: dict = {"name": data.name, "images": len(data)}
    if data.captions is None:
        labels, classes, _ = data.labelling
        facts["classes"] = _class_counts(labels, classes)
    else:
        captions, image = data.captioning
        facts |= {"captions": len(captions), "distinct_texts": len(set(captions))}
        facts |= _caption_facts(np.bincount(image, minlength=len(data)), captions)
    return facts | {"image_headers": _image_headers(data.images, seed), "left_out": _left_out(data.skipped)}


def _shard_facts(source: ShardSource, seed: int) -> dict:
    items = _some_items(source, seed)
    good = [item for item in items if item.reason is None]
    facts: dict = {"name": source.where, "pairs": source.size, "shards": len(source.shards), "looked_at": len(items)}
    facts["distinct_texts"] = source.distinct_texts
    if source.templates:
        names = {fill(source.templates[0], name): name for name in source.classes or ()}
        counts = Counter(names.get(item.texts[0], item.texts[0]) for item in good)
        facts["classes"] = dict(sorted(counts.items()))
    else:
        captions: Counter[str] = Counter()
        for item in good:
            captions[item.key] += len(item.texts)
        facts |= _caption_facts(np.array(list(captions.values())), [text for item in good for text in item.texts])
    # With several captions an image comes several times; the sample is evenly spaced among the images.
    images = list({item.key: item.image for item in good}.values())
    sampled = images[:: max(1, len(images) // SAMPLED)][:SAMPLED]
    # All of them where the shards were counted; else those that were looked at.
    left_out = source.unusable or [(item.key, item.reason) for item in items if item.reason]
    return facts | {
        "image_headers": _summary([_header(content) for content in sampled]),
        "left_out": _left_out(left_out),
    }


def _some_items(source: ShardSource, seed: int) -> list[Item]:
    """Return pairs of the first samples of a few random shards, the same ones for a seed: none is fetched twice."""
    found, left = [], SAMPLES
    for shard in np.random.default_rng(seed).permutation(len(source.shards))[:SHARDS].tolist():
        for _, items in source.read(shard, range(min(left, SAMPLES // 2))):
            left -= 1
            found += items
        if not left:
            break
    return found


def _random_pairs(source: Source, seed: int) -> list[_Pair]:
    """Return at most 24 pairs; of a mixture, each source has a share by its weight."""
    rng = np.random.default_rng(seed)
    if isinstance(source, MixedSource):
        left = [_random_pairs(part, seed) for part in source.parts]
        drawn = rng.choice(len(left), PICTURED, p=source.weights).tolist()
        return [left[part].pop() for part in drawn if left[part]]
    if isinstance(source, ShardSource):
        good = [item for item in _some_items(source, seed) if item.reason is None]
        chosen = [good[place] for place in rng.permutation(len(good))[:PICTURED]]
        return [_Pair(partial(decode_image, item.image, _SMALL), str(rng.choice(item.texts))) for item in chosen]
    assert isinstance(source, IndexedSource)
    return [_random_pair(source, pair, rng) for pair in rng.permutation(source.size)[:PICTURED].tolist()]


def _random_pair(source: IndexedSource, pair: int, rng: np.random.Generator) -> _Pair:
    text = source.first_text[pair] + rng.integers(source.text_count[pair])
    return _Pair(partial(source.images.open, int(source.image[pair]), _SMALL), source.texts[text])


def _class_counts(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


def _caption_facts(captions: np.ndarray, texts: Sequence[str]) -> dict:
    words = np.array([len(text.split()) for text in texts], dtype=np.int64)
    return {"captions_per_image": _spread(captions), "words_per_caption": _spread(words)}


def _spread(values: np.ndarray) -> dict:
    if not len(values):
        return {"min": 0, "mean": 0.0, "max": 0}
    return {"min": int(values.min()), "mean": round(float(values.mean()), 2), "max": int(values.max())}


def _left_out(skipped: Sequence[tuple[str, str]]) -> dict[str, dict]:
    """Count the skips by reason, and name the first few."""
    reasons = Counter(reason for _, reason in skipped)
    first = {reason: [key for key, why in skipped if why == reason][:MOST_NAMED] for reason in reasons}
    return {reason: {"count": count, "first": first[reason]} for reason, count in reasons.most_common()}


def _lines(title: str, facts: dict) -> Iterator[str]:
    """Yield the printed lines on training or held-out data, the title before the first."""
    label = title
    for line in _statements(facts):
        yield f"{label:<11}{line}"
        label = ""


def _statements(facts: dict) -> Iterator[str]:
    units = {"pairs": "pairs", "images": "images", "captions": "captions", "shards": "shards"}
    units |= {"distinct_texts": "distinct texts", "looked_at": "samples looked at"}
    counts = [f"{facts[name]:,} {unit}" for name, unit in units.items() if facts.get(name) is not None]
    weight = f", weight {facts['weight']:g}" if "weight" in facts else ""
    yield f"{facts['name']}{weight}{': ' * bool(counts)}{', '.join(counts)}"
    for name in ("captions_per_image", "words_per_caption"):
        if name in facts:
            spread = facts[name]
            yield f"{name.replace('_', ' ')}: {spread['min']} to {spread['max']}, mean {spread['mean']:g}"
    if "image_headers" in facts:
        yield from _header_statements(facts["image_headers"])
    for reason, of_reason in facts.get("left_out", {}).items():
        more = ", …" if of_reason["count"] > len(of_reason["first"]) else ""
        yield f"left out: {of_reason['count']:,} {reason} ({', '.join(of_reason['first'])}{more})"
    yield from _class_statements(facts.get("classes", {}))
    for part in facts.get("parts", []):
        yield from _statements(part)


def _header_statements(headers: dict) -> Iterator[str]:
    for side in ("width", "height"):
        if side in headers:
            yield f"{side}: {headers[side]['min']} to {headers[side]['max']}, median {headers[side]['median']:g}"
    kinds = [f"{count} {kind}" for kind, count in (headers["formats"] | headers["modes"]).items()]
    unreadable = f"; {headers['unreadable']} without a readable header" if headers["unreadable"] else ""
    yield f"of {headers['sampled']} images: {', '.join(kinds)}{unreadable}"


def _class_statements(classes: dict[str, int]) -> Iterator[str]:
    """Yield a line per class; of many classes those with the most and those with the fewest images."""
    if not classes:
        return
    yield f"{len(classes)} classes, images of each:"
    ranked = sorted(classes.items(), key=lambda entry: (-entry[1], entry[0]))
    width = max(len(name) for name in classes)
    half = MOST_CLASSES // 2
    shown = ranked if len(ranked) <= MOST_CLASSES else [*ranked[:half], None, *ranked[-half:]]
    for entry in shown:
        yield f"  … {len(ranked) - 2 * half} more" if entry is None else f"  {entry[0]:<{width}} {entry[1]:>7,}"


def _image_headers(images: Images, seed: int) -> dict:
    """Summarize widths and heights as stored, formats and modes of 200 random images."""
    rows = np.random.default_rng(seed).permutation(len(images))[:SAMPLED].tolist()
    return _summary([_header_of(images, row) for row in rows])


def _header_of(images: Images, row: int) -> _Header | None:
    with suppress(BadImage, OSError):
        if isinstance(images, ImageFiles):
            return _header(read_image_file(images.paths[row]))
        if isinstance(images, RowImages | TarImages):
            stored = images.content(row)
            return _header(stored if isinstance(stored, bytes) else read_image_file(stored))
        image = images.open(row)
        return _Header(image.width, image.height, "in memory", image.mode)
    return None


def _header(content: bytes) -> _Header | None:
    with suppress(Exception), Image.open(io.BytesIO(content)) as image:  # Pillow raises errors of many types
        return _Header(image.width, image.height, image.format or "unknown", image.mode)
    return None


def _summary(headers: Sequence[_Header | None]) -> dict:
    good = [header for header in headers if header is not None]
    sides = {}
    for side in ("width", "height") if good else ():
        values = [getattr(header, side) for header in good]
        sides[side] = {"min": min(values), "median": float(np.median(values)), "max": max(values)}
    return {
        "sampled": len(headers),
        **sides,
        "formats": dict(Counter(header.format for header in good).most_common()),
        "modes": dict(Counter(header.mode for header in good).most_common()),
        "unreadable": len(headers) - len(good),
    }


def _plot(pairs: Sequence[_Pair], title: str, path: Path) -> None:
    """Draw the pairs in rows of six; an image that cannot be decoded is a grey square with the reason."""
    from matplotlib.figure import Figure  # as in the loss curve: it takes two seconds to import

    rows = -(-len(pairs) // COLUMNS) or 1
    figure = Figure(figsize=(2.2 * COLUMNS, 2.9 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)
    for axes in figure.subplots(rows, COLUMNS, squeeze=False).flat:
        axes.axis("off")
    for axes, pair in zip(figure.axes, pairs, strict=False):
        try:
            image = pair.open()
            # Small ones are shown pixel by pixel; each stands on its text, with white above it.
            enlarge = Image.Resampling.NEAREST if max(image.size) < 112 else Image.Resampling.BICUBIC
            axes.imshow(ImageOps.pad(image, (224, 224), enlarge, color="white", centering=(0.5, 1)))
        except BadImage as bad:
            axes.imshow(Image.new("RGB", (224, 224), "lightgrey"))
            axes.text(0.5, 0.5, bad.reason, transform=axes.transAxes, ha="center", va="center", fontsize=10)
        lines = textwrap.wrap(" ".join(pair.text.split()), width=28, max_lines=5, placeholder=" …")
        axes.text(0, -0.03, "\n".join(lines), transform=axes.transAxes, fontsize=8.5, va="top", parse_math=False)
    figure.savefig(path, dpi=112, bbox_inches="tight")
