"""Results of a task, and the files that evaluate.py writes of them: metrics.json, PNG files and report.html."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lib.data.evaluation_set import EvaluationSet
from lib.evaluation.embed import Embedded, counted
from lib.files import write_text

Rows = Sequence[Sequence[str]]
"""A table for people: the head, then the lines."""

OpenImage = Callable[[int], Image.Image]
"""An image by row number."""

MOST_LISTED = 50  # skipped images in the report
LEGIBLE = 0.6  # images are shrunk to fit the page, but not below this share of their own width
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
.picture { overflow-x: auto; }
.picture img { max-width: 100%; }
"""


class Picture(NamedTuple):
    """A chart or a sheet of images."""

    title: str
    """its heading in the report, different from all others"""
    file: str
    draw: Callable[[Path], None]
    """writes the PNG to a path"""


@dataclass(frozen=True)
class Outcome:
    """Results of a task."""

    metrics: dict
    """the content of metrics.json"""
    facts: dict[str, str]
    """model, data and settings, for people"""
    tables: dict[str, Rows]
    """figures for people by heading, the shortest table first"""
    pictures: Sequence[Picture]


def write_results(outcome: Outcome, folder: Path) -> None:
    """Write metrics.json, the pictures and report.html; print the facts, the first table and the files."""
    # One line per key: a confusion matrix is long, and nobody reads it number by number.
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in outcome.metrics.items())
    write_text(folder / "metrics.json", "{\n" + lines + "\n}\n")
    files = {picture.title: folder / picture.file for picture in outcome.pictures}
    for picture in outcome.pictures:
        picture.draw(files[picture.title])
    title, table = next(iter(outcome.tables.items()))
    write_report(folder / "report.html", title, outcome.facts, outcome.tables, files)
    print("\n" + "\n".join(f"{name}: {fact}" for name, fact in outcome.facts.items()))
    print("\n" + aligned(table))
    print(f"\nreport: {folder / 'report.html'}")
    print("pictures: " + ", ".join(map(str, files.values())))


def data_facts(data: EvaluationSet, embedded: Embedded) -> dict[str, str]:
    """Name of the data, number of images, and how many were skipped for which reason."""
    facts = {"data": data.name, "images": str(int(embedded.valid.sum()))}
    skipped = [*data.skipped, *embedded.skipped]
    if skipped:
        facts["skipped"] = f"{len(skipped)} ({counted(reason for _, reason in skipped)})"
    return facts


def skipped_table(data: EvaluationSet, embedded: Embedded) -> dict[str, Rows]:
    """Images that could not be read, with the reasons; no table if there are none."""
    skipped = [*data.skipped, *embedded.skipped]
    if not skipped:
        return {}
    more = [["…", f"{len(skipped) - MOST_LISTED} more"]] if len(skipped) > MOST_LISTED else []
    return {"Skipped": [["image", "reason"], *map(list, skipped[:MOST_LISTED]), *more]}


def decimals(value: float | int) -> str:
    """A number of a table: four decimals, none for a count."""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def words(key: str) -> str:
    """A key of metrics.json as people write it: "macro F1" for macro_f1."""
    return {"top5": "top-5", "f1": "F1", "macro_f1": "macro F1"}.get(key, key.replace("_", " "))


def aligned(rows: Rows) -> str:
    """The rows as text in columns, the first one aligned left and the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def write_report(
    path: Path, title: str, facts: dict[str, str], tables: dict[str, Rows], pictures: Mapping[str, Path]
) -> None:
    """Write one HTML file that loads nothing: facts, the first table, the pictures, then the other, longer tables.

    pictures: PNG files by heading, which are embedded.
    """
    first, *others = [f"<h2>{escape(heading)}</h2>{_table(rows)}" for heading, rows in tables.items()]
    shown = [f"<h2>{escape(heading)}</h2>{_image(heading, file)}" for heading, file in pictures.items()]
    body = "\n".join([f"<h1>{escape(title)}</h1>", _facts(facts), first, *shown, *others])
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    write_text(path, f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n')


def _facts(facts: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts.items()) + "</dl>"


def _table(rows: Rows) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head, *body = rows
    return f"<table>{line(head, 'th')}{''.join(line(cells, 'td') for cells in body)}</table>"


def _image(heading: str, file: Path) -> str:
    encoded = base64.b64encode(file.read_bytes()).decode("ascii")
    with Image.open(file) as image:
        least = round(LEGIBLE * image.width)  # a confusion matrix of a hundred classes is scrolled
    source = f'style="min-width: {least}px" src="data:image/png;base64,{encoded}"'
    return f'<div class="picture"><img alt="{escape(heading)}" {source}></div>'
