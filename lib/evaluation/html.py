"""The HTML report: one file with everything in it, the pictures too."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from lib.evaluation.outcome import Picture, Rows
from lib.files import write_text

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
LEGIBLE = 0.6  # of a picture's own size: it is shrunk to fit the page, but not further than this


def write_report(
    path: Path,
    title: str,
    facts: dict[str, str],
    tables: dict[str, Rows],
    pictures: Sequence[Picture],
) -> None:
    """Write the report: facts, the first table, the pictures, then the other tables, which may be long.

    A table's first row is its head; pictures are embedded as they lie on disk.
    """
    first, *others = [f"<h2>{escape(heading)}</h2>{_table(rows)}" for heading, rows in tables.items()]
    drawn = [f"<h2>{escape(picture.title)}</h2>{_image(picture)}" for picture in pictures]
    parts = [f"<h1>{escape(title)}</h1>", _facts(facts), first, *drawn, *others]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    write_text(path, page)


def aligned(rows: Rows) -> str:
    """The rows as text in columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _facts(facts: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts.items()) + "</dl>"


def _table(rows: Rows) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head, *body = rows
    return f"<table>{line(head, 'th')}{''.join(line(cells, 'td') for cells in body)}</table>"


def _image(picture: Picture) -> str:
    encoded = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    with Image.open(picture.path) as image:
        least = round(LEGIBLE * image.width)  # a confusion matrix of a hundred classes is scrolled
    source = f'style="min-width: {least}px" src="data:image/png;base64,{encoded}"'
    return f'<div class="picture"><img alt="{escape(picture.title)}" {source}></div>'
