"""The automatic settings against a grid of twelve: rate, epochs and what trains, on parts of one data set.

    python benchmarks/defaults.py --data har --image-tower TOWER --text-tower TOWER --sizes 150 600 2250

trains the sigmoid loss on the first images of the training split (of each class alike, or of a table of captions), with
automatic settings, with each point of the grid, and with `--former`, the flags that README named before. A point sets
--freeze, --epochs and the rate of what trains, and leaves the other settings automatic. The score of a run is its last
validation: accuracy, or the mean of R@1, R@5 and R@10 of both directions. Raw results go to a JSON file, which a
second call with other sizes or data adds to.
"""

import csv
import json
import statistics
import tempfile
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import tyro
from training_runs import ROOT, Recipe, spread

DIRECTIONS = ("image_to_text", "text_to_image")
HEADS = ("image.trunk", "text.trunk")
IMAGE = ("text.trunk", "batchnorm")


@dataclass(frozen=True)
class Settings(Recipe):
    """Data, towers, and the settings to compare."""

    output: Path = ROOT / "benchmarks" / "results" / "defaults.json"
    """JSON file of the raw results."""
    sizes: tuple[int, ...] = (150, 600, 2250)
    """Images of the training split."""
    former: bool = True
    """Train with the flags that README named before, too."""


FORMER = (
    "--lr=1e-5", "--head-lr=1e-5", "--effective-batch=256", "--xbm-size=0", "--epochs=30", "--head-epochs=0",
    "--layer-decay=1", "--freeze=none", "--augment=none",
)  # fmt: skip


def grid() -> dict[str, tuple[str, ...]]:
    """Twelve settings: heads alone, or the image trunk too after the heads; three rates; two numbers of epochs."""
    points = {}
    for rate, epochs in product((3e-4, 1e-3, 3e-3), (5, 20)):
        points[f"heads, {rate:g}, {epochs} epochs"] = ("--freeze", *HEADS, f"--lr={rate}", f"--epochs={epochs}")
    for rate, epochs in product((5e-5, 2e-4, 8e-4), (3, 10)):
        points[f"image trunk, {rate:g}, {epochs} epochs"] = ("--freeze", *IMAGE, f"--lr={rate}", f"--epochs={epochs}")
    return points


def main(settings: Settings) -> None:
    """Train all combinations and print their table."""
    rows = json.loads(settings.output.read_text()) if settings.output.exists() else []
    kinds = {"auto": (), **grid(), **({"former": FORMER} if settings.former else {})}
    for size, (name, flags) in product(settings.sizes, kinds.items()):
        kind = {"data": Path(settings.data).stem, "images": size, "settings": name}
        if any(row | kind == row for row in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            of_size = replace(settings, data=str(first_images(Path(settings.data), size, Path(folder))))
            runs = of_size.runs("siglip", *flags, "--eval-every=1000000", "--save-every=0")
        rows.append(kind | {"runs": [{"score": score(run["eval"]), "seconds": run["wall_seconds"]} for run in runs]})
        settings.write(rows)
    print("\n" + "\n".join(table(rows)))


def first_images(data: Path, count: int, folder: Path) -> Path:
    """The data with the first images of its training split, of every class alike, and all others; files are linked."""
    root, cut = (data, data / "train") if data.is_dir() else (data.parent, data)
    for other in root.iterdir():
        if other != cut:
            (folder / other.name).symlink_to(other.resolve())
    if data.is_dir():
        classes = sorted(path for path in cut.iterdir() if path.is_dir())
        for one in classes:
            (folder / "train" / one.name).mkdir(parents=True)
            for image in sorted(one.iterdir())[: count // len(classes)]:
                (folder / "train" / one.name / image.name).symlink_to(image.resolve())
        return folder
    with data.open(newline="") as file:
        lines = list(csv.DictReader(file))
    names = dict.fromkeys(line["filename"] for line in lines if line["split"] == "train")
    kept = set(list(names)[:count])
    with (folder / data.name).open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(line for line in lines if line["split"] != "train" or line["filename"] in kept)
    return folder / data.name


def score(found: dict) -> float:
    """Accuracy, or the mean recall of both directions."""
    if "accuracy" in found:
        return found["accuracy"]
    return statistics.mean(found[direction][f"R@{k}"] for direction in DIRECTIONS for k in (1, 5, 10))


def table(rows: list[dict]) -> list[str]:
    """Markdown table: automatic settings, the best of the grid and the former flags, for every part of the data."""
    lines = ["| data | images | automatic | best of 12 | its settings | former flags |", "|---" * 6 + "|"]
    for data, images in dict.fromkeys((row["data"], row["images"]) for row in rows):
        of_part = {row["settings"]: row["runs"] for row in rows if (row["data"], row["images"]) == (data, images)}
        best = max(grid().keys() & of_part.keys(), key=lambda name: mean(of_part[name]), default=None)
        shown = [spread(of_part[name], "score") if name in of_part else "" for name in ("auto", best, "former")]
        lines.append(f"| {data} | {images:,} | {shown[0]} | {shown[1]} | {best or ''} | {shown[2]} |")
    return lines


def mean(runs: list[dict]) -> float:
    """Mean score."""
    return statistics.mean(run["score"] for run in runs)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
