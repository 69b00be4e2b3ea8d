"""Read = used + skipped for random folders and tables with all kinds of faults, whose numbers are known."""

import csv
import io
import json
import os
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from made_shards import all_ranks, png, totals

from lib.data import open_evaluation, open_sources
from lib.data.fetcher import default_fetcher
from lib.data.info import data_info
from lib.data.pack.entries import list_samples
from lib.data.recognize import open_data

DECODED = {"not_an_image", "empty", "truncated", "unknown_format"}
"""Reasons that are found when an image is opened."""
CONTENTS = {"not_an_image": b"text", "empty": b"", "truncated": png(5)[:60], "unknown_format": b"\0\0\0\x18ftypheic"}


@dataclass
class Made:
    """Expected counts of the data: good pairs by split, and bad ones by reason."""

    path: Path
    good: Counter = field(default_factory=Counter)
    bad: defaultdict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))

    @property
    def splits(self) -> set[str]:
        return {split for split, count in self.good.items() if count}


def check(made: Made, seed: int, tmp_path: Path) -> None:
    """Training, evaluation, the packer and --data-info find the expected counts."""
    data = str(made.path)
    first = "train" if "train" in made.splits else "all"
    for split in set(made.bad) - made.splits:  # of no split, or of one without a usable sample
        made.bad[first] += made.bad.pop(split)
    known = {
        split: Counter({why: n for why, n in bad.items() if why not in DECODED}) for split, bad in made.bad.items()
    }
    source, _ = open_sources(data, None, None)
    assert Counter(why for _, why in source.skipped) == known.get(first, Counter()), seed
    assert source.size == made.good[first] + sum((made.bad[first] - known.get(first, Counter())).values()), seed
    for split in made.splits:
        evaluation = open_evaluation(data, "train" if split == "all" else split, None)
        assert Counter(why for _, why in evaluation.skipped) == known.get(split, Counter()), (seed, split)
        read = len(evaluation.captions or evaluation.images)
        assert read == made.good[split] + sum((made.bad[split] - known.get(split, Counter())).values()), (seed, split)
    packed = list_samples(open_data(data, "SOURCE", None, default_fetcher()), "SOURCE", default_fetcher())
    reasons = Counter(why for _, why in packed.malformed) + Counter(why for e in packed.entries for _, why in e.faults)
    assert reasons == sum(known.values(), Counter()), seed
    if seed % 3 == 0:
        parts = all_ranks(source, 1 + seed % 2, augment="none")
        for part in parts:
            list(part.steps(0, 1 + source.size // 12))
        skipped = dict(made.bad[first])
        assert totals(parts) == (made.good[first] + sum(skipped.values()), made.good[first], skipped), seed
    if seed % 20 == 0:
        data_info(source, None, tmp_path / "info")
        left_out = json.loads((tmp_path / "info" / "data_info.json").read_text())["training"]["left_out"]
        assert {why: each["count"] for why, each in left_out.items()} == dict(known.get(first, {})), seed


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Folders


class Tree:
    """A randomly filled folder; `odd` has the possible faults of a place, each with its expected reason."""

    def __init__(self, root: Path, draw: random.Random):
        self.made, self.draw, self.number = Made(root), draw, 0
        root.mkdir()

    def name(self, suffix: str = "") -> str:
        self.number += 1
        stem = self.draw.choice(["{}", "photo {}", "ä {}", "a.b.{}", "two\nlines {}"]).format(self.number)
        return stem + (suffix or self.draw.choice([".png", ".PNG", ".jpe"]))

    def image(self, folder: Path, split: str, reason: str | None = None) -> None:
        """A good image, which is used or has the reason."""
        put(folder / self.name(), png(self.number % 7))
        self.made.good[split] += reason is None
        self.made.bad[split] += Counter([reason] if reason else [])

    def odd_entry(self, folder: Path, split: str, reason: str | None = None) -> None:
        """Entries named like images that are none; `reason` if every image in this folder has it."""
        bad, kind = self.made.bad[split], self.draw.randrange(9)
        if kind == 0:
            (folder / self.name()).symlink_to("nowhere.png")
            bad["missing"] += 1
        elif kind == 1:
            name = self.name()
            (folder / name).symlink_to(name)
            bad["missing"] += 1
        elif kind == 2:
            os.mkfifo(folder / self.name())
            bad["not_a_file"] += 1
        elif kind == 3:
            (folder / self.name()).mkdir()
            bad["not_a_file"] += 1
        elif kind == 4:
            put(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9%d.png" % self.number)), png(1))
            self.number += 1
            bad[reason or "not_utf8"] += 1
        elif kind == 5:
            why = self.draw.choice([*CONTENTS])
            put(folder / self.name(".heic" if why == "unknown_format" else ""), CONTENTS[why])
            bad[reason or why] += 1
        elif kind == 6:
            put(folder / f"._{self.name()}", b"\0\5\x16\7")
        elif kind == 7:
            put(folder / ".hidden" / self.name(), png(1))
        else:
            put(folder / f"{self.number}.txt.bak", b"notes")

    def output(self, folder: Path, split: str) -> None:
        """A run or report of this project, which counts as one entry."""
        marks = self.draw.choice([("config.yaml", "metrics.jsonl"), ("metrics.json", "report.html")])
        for name in (*marks, "loss_curve.png", "deep/confusion.png"):
            put(folder / f"run{self.number}" / name, b"x")
        self.number += 1
        self.made.bad[split]["a_run"] += 1

    def odd_places(self, folder: Path, split: str, here: str, below: str) -> None:
        """Images and oddities in a folder and in subfolders of it."""
        for _ in range(self.draw.randrange(3)):
            self.image(folder, split, here)
        for _ in range(self.draw.randrange(3)):
            self.image(folder / "sub" / self.draw.choice("xy") / "deep", split, below)
        if self.draw.random() < 0.3:
            self.odd_entry(folder, split, here)
        if self.draw.random() < 0.2:
            self.output(folder, split)
        if self.draw.random() < 0.2:
            (folder / f"loop{self.number}").symlink_to(f"loop{self.number}")
        if self.draw.random() < 0.2:
            (folder / f"up{self.number}").symlink_to("..")


def random_class_folders(root: Path, draw: random.Random) -> tuple[Made, set[str]]:
    """Class folders, and those that cannot be opened."""
    tree, unreadable = Tree(root, draw), set()
    places = {"all": root} if draw.random() < 0.5 else {}
    for split, names in {"train": ["train"], "val": ["val", "valid", "dev"], "test": ["test", "Test"]}.items():
        if not places.get("all") and (split == "train" or draw.random() < 0.5):
            places[split] = root / draw.choice(names)
    for split, place in places.items():
        for name in ("cat", "sea_gull", "sea gull", "dog", "Dog"):
            folder = place / name
            for _ in range(draw.randint(1, 3)):
                tree.image(folder, split)
            for _ in range(draw.randrange(3)):
                tree.odd_entry(folder, split)
            for _ in range(draw.randrange(2)):
                tree.image(folder / "more" / "deep", split, "in_subfolder")
            if draw.random() < 0.1:
                tree.output(folder, split)
        if draw.random() < 0.3:
            put(Path(os.fsdecode(os.fsencode(place) + b"/gar\xe7on/1.png")), png(2))
            tree.made.bad[split]["not_utf8"] += 1
        if draw.random() < 0.3:
            put(place / "closed" / "1.png")
            unreadable.add(str(place / "closed"))
            tree.made.bad[split]["unreadable_folder"] += 1
        if split != "all":
            tree.odd_places(place, split, "no_class", "in_subfolder")
    if "all" in places:
        tree.odd_places(root, "none", "no_class", "in_subfolder")
    else:
        for _ in range(draw.randrange(3)):
            tree.image(root / "other", "none", "no_split")
        tree.odd_entry(root, "none", "no_class")
        put(root / "labels.csv", b"image,weight\n1.png,3\n")
    return tree.made, unreadable


def test_every_image_of_random_class_folders_is_used_or_counted(tmp_path, monkeypatch):
    scandir = os.scandir
    for seed in range(60):
        made, unreadable = random_class_folders(tmp_path / str(seed), random.Random(seed))

        def guarded(path=".", closed=unreadable):
            if str(path) in closed:
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", guarded)
            check(made, seed, tmp_path)


# Tables


class TableMaker:
    """Good and bad rows of a CSV, TSV or JSONL file, each with its expected outcome."""

    def __init__(self, folder: Path, suffix: str, draw: random.Random, split: str | None):
        self.folder, self.suffix, self.draw, self.split = folder, suffix, draw, split
        self.lines: list[bytes] = []
        self.mark = {".csv": ",", ".tsv": "\t"}.get(suffix, "")
        self.good, self.bad, self.count = Counter(), defaultdict(Counter), 0
        self.unnamed = 0
        """good images of which no row was read"""

    def image(self, exists: bool = True) -> str:
        self.count += 1
        name = self.draw.choice(["{}.png", "a {}.PNG", "ä{}.jpe", "deep/{}.png"]).format(self.count)
        if exists:
            put(self.folder / name, png(self.count % 5))
        return name

    def row(self, image: str, caption: object, *more: str) -> None:
        if self.suffix == ".jsonl":
            self.lines.append(json.dumps({"file_name": image, "caption": caption}).encode())
            return
        text = io.StringIO()
        csv.writer(text, delimiter=self.mark, lineterminator="").writerow([image, caption, *more])
        self.lines.append(text.getvalue().encode())

    def add(self) -> None:
        kinds = [self.good_row, self.poem, self.missing, self.empty, self.empty, self.malformed, self.not_utf8]
        self.draw.choice([*kinds, self.good_row, self.lost_mark, self.blank])()

    def good_row(self) -> None:
        self.row(self.image(), self.draw.choice(["plain", 'a "big" dog', "one, two", "it's", "tab ;|", "7"]))
        self.good[self.split] += 1

    def poem(self) -> None:
        if self.suffix == ".jsonl":
            self.row(self.image(), ["one", "two\nlines", 7])
            self.good[self.split] += 3
        else:
            self.row(self.image(), 'first line\n\nthird, "quoted", line\nthe end')
            self.good[self.split] += 1

    def missing(self) -> None:
        self.row(self.image(exists=False), "x")
        self.bad[self.split]["missing"] += 1

    def empty(self) -> None:
        caption = self.draw.choice([None, "", " \t", float("nan"), []]) if self.suffix == ".jsonl" else "  "
        self.row(self.image(), caption)
        self.bad[self.split]["empty_caption"] += 1

    def malformed(self) -> None:
        if self.suffix == ".jsonl":
            name = json.dumps(self.image())
            self.unnamed += 1
            odd = ["{", "[1]", "[" * 100_000, f'{{"file_name": {name}, "caption": {{"a": 1}}}}', '{"file_name": 17}']
            odd += ['{"file_name": "a\\u0000b/x.png", "caption": "x"}', f'{{"file_name": {name}, "caption": [["x"]]}}']
            odd += ['{"caption": "x"}', f'{{"file_name": {name}, "caption": "x", "group": [1]}}', "1" * 5000]
            self.lines.append(self.draw.choice(odd).encode())
        else:
            name, mark = self.image(), self.mark
            self.unnamed += 1
            odd = [f"{name}{mark}one{mark} two", name, f"{mark}no name", f"a\0b{mark}x", mark * 4 + "x"]
            odd += [f'{name}{mark}"quoted" and more'] if self.suffix == ".csv" else []
            self.lines.append(self.draw.choice(odd).encode())
        self.bad[None]["malformed_row"] += 1

    def not_utf8(self) -> None:
        name = self.image().encode()
        if self.suffix == ".jsonl":
            self.lines.append(b'{"file_name": "%s", "caption": "caf\xe9"}' % name)
        else:
            self.lines.append(name + self.mark.encode() + b"caf\xe9")
        self.bad[self.split]["not_utf8"] += 1

    def lost_mark(self) -> None:
        if self.suffix == ".jsonl":
            return
        self.lines.append(f'{self.image()}{self.mark}"never closed'.encode())
        if self.suffix == ".tsv":
            self.good[self.split] += 1
        else:
            self.bad[None]["unclosed_quote"] += 1
            self.unnamed += 1

    def blank(self) -> None:
        self.lines.append(self.draw.choice([b"", b"  "]))

    def write(self, name: str) -> Path:
        header = [f"file_name{self.mark}caption".encode()] if self.mark else []
        ends = self.draw.choice([b"\n", b"\r\n"])
        mark = self.draw.choice([b"", b"\xef\xbb\xbf"])
        return put(self.folder / name, mark + ends.join([*header, *self.lines]) + self.draw.choice([b"", ends]))


def made_of(table: TableMaker, path: Path, made: Made | None = None) -> Made:
    made = made or Made(path)
    made.good += table.good
    for split, bad in table.bad.items():
        made.bad[split or "none"] += bad
    return made


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_every_row_of_random_tables_is_used_or_counted(tmp_path, suffix):
    for seed in range(20):
        table = TableMaker(tmp_path / str(seed), suffix, random.Random(seed), "train")
        table.good_row()
        for _ in range(table.draw.randrange(14)):
            table.add()
        check(made_of(table, table.write(f"t{suffix}")), seed, tmp_path)


def test_every_row_and_image_of_random_imagefolders_is_used_or_counted(tmp_path):
    for seed in range(40):
        draw, root = random.Random(seed), tmp_path / str(seed)
        made, tree = None, Tree(root, draw)
        for split, name in draw.choice([{"all": ""}, {"train": "train", "test": "test"}, {"train": "train"}]).items():
            table = TableMaker(root / name, draw.choice([".csv", ".jsonl"]), draw, split)
            table.good_row()
            for _ in range(draw.randrange(10)):
                table.add()
            for _ in range(draw.randrange(3)):
                put(root / name / "unnamed" / f"{draw.random()}.png", png(1))
                table.bad[split]["no_row"] += 1
            if table.unnamed:
                table.bad[split]["no_row"] += table.unnamed
            table.bad[split] += table.bad.pop(None, Counter())  # the folder tells
            made = made_of(table, root, made)
            table.write(f"metadata{table.suffix}")
            tree.made = made
            if draw.random() < 0.3:
                tree.output(root / name, split)
            if draw.random() < 0.3:
                os.mkfifo(root / name / "pipe.png")
                made.bad[split]["not_a_file"] += 1
        check(made, seed, tmp_path)
