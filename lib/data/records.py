"""Records of files, for the readers: cells of CSV and TSV, objects of JSON Lines, entries of a JSON file."""

import csv
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO, TypeVar

from lib.data.caption_table import CaptionRow
from lib.errors import InputError, raised_as, readable
from lib.files import open_text

_MOST_LINES = 200
"""Lines that a quoted cell may have: limits the work that one unclosed quotation mark makes."""
_LONGEST_HEADER = 2**20
_QUOTE = '"'

Cells = list[str]
_Entry = TypeVar("_Entry")


class Delimited:
    """Rows of a CSV or TSV file that begins with its column names.

    Python's csv reads on to the next quotation mark, so that one lost mark swallows all rows up to it, without an
    error. This reader is strict (RFC 4180): a row has as many cells as the header, apart from empty ones at its end,
    and nothing follows the end of a quoted cell. In TSV files, where most programs quote nothing, a quotation mark
    that does not quote in this way is an ordinary character.
    """

    def __init__(self, file: TextIO, suffix: str):
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses captions above 128 KiB
        self._lines = _Lines(file)
        first = self._lines.first().replace("\r", " ")
        usual = "\t" if suffix == ".tsv" else ","
        self.delimiter = next((mark for mark in (usual, "\t", ";", ",") if mark in first), usual)
        self._opens = re.compile(f"(?:^|{self.delimiter}){_QUOTE}")
        self.header: Cells = next(csv.reader((first,), delimiter=self.delimiter), [])

    def rows(self, is_row: Callable[[Cells], bool]) -> Iterator[tuple[int, Cells | str]]:
        """Yield (line number, cells, or the reason why the line is no row) of each line that is not blank.

        is_row: True for cells that look like a row of this table. A quoted cell with such lines in it was never
        closed, and the lines are rows.
        """
        width, delimiter = len(self.header), self.delimiter
        for line in self._lines:
            number = self._lines.number
            cells = line.split(delimiter) if _QUOTE not in line else self._quoted(line, is_row)
            if isinstance(cells, str) or len(cells) == width or self._fits(cells):
                yield number, cells
            elif line.strip():
                yield number, "malformed_row"

    def _fits(self, cells: Cells) -> bool:
        """True where the row has as many cells as the header; empty ones beyond these are removed."""
        while len(cells) > len(self.header) and not cells[-1].strip():
            cells.pop()
        return len(cells) == len(self.header)

    def _quoted(self, line: str, is_row: Callable[[Cells], bool]) -> Cells | str:
        """Return the cells of a line with quotation marks, and of the lines after it where a quoted cell continues."""
        line = line.replace("\r", " ")
        try:
            return next(csv.reader((line,), delimiter=self.delimiter, strict=True))
        except csv.Error:
            cells, lines, continues = self._over_lines(line, is_row)
        if cells is not None and self._fits(cells):
            self._lines.skip(lines)
            return cells
        if self.delimiter == "\t":
            return line.split("\t")
        return "unclosed_quote" if continues else "malformed_row"

    def _over_lines(self, line: str, is_row: Callable[[Cells], bool]) -> tuple[Cells | None, int, bool]:
        """Return (cells or None, number of further lines they take, True where the first line ends within a cell)."""
        lines, continues = 0, False

        def read_lines() -> Iterator[str]:
            nonlocal lines, continues
            yield line + "\n"
            continues = True
            for further in self._lines.ahead(_MOST_LINES):
                if self._begins_row(further, is_row):
                    return
                lines += 1
                yield further.replace("\r", " ") + "\n"

        with suppress(csv.Error):
            return next(csv.reader(read_lines(), delimiter=self.delimiter, strict=True)), lines, continues
        return None, 0, continues

    def _begins_row(self, line: str, is_row: Callable[[Cells], bool]) -> bool:
        """True where a line within a quoted cell is a row of its own."""
        marks = line.count(_QUOTE)
        if not marks:
            return is_row(line.split(self.delimiter))
        if marks % 2 and not self._opens.search(line):
            return False  # it closes the cell
        cells = next(csv.reader((line.replace("\r", " "),), delimiter=self.delimiter))
        return is_row(cells + [""] * (len(self.header) - len(cells) if marks % 2 else 0))


class _Lines:
    """Lines of a file without their ends, with look-ahead."""

    def __init__(self, file: TextIO):
        self._file = file
        self._ahead: deque[str] = deque()
        self.number = 0
        """of the last line returned"""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else next(self._file).rstrip("\r\n")
        self.number += 1
        return line

    def first(self) -> str:
        """Return the first line that is not blank, "" if there is none; of a huge one, which is no header, a piece."""
        while line := self._file.readline(_LONGEST_HEADER):
            self.number += 1
            if line.strip():
                return line.rstrip("\r\n")
        return ""

    def ahead(self, count: int) -> Iterator[str]:
        """Yield the next lines, at most `count`, without consuming them."""
        for place in range(count):
            if place == len(self._ahead):
                line = next(self._file, None)
                if line is None:
                    return
                self._ahead.append(line.rstrip("\r\n"))
            yield self._ahead[place]

    def skip(self, count: int) -> None:
        """Consume lines that were looked at."""
        for _ in range(count):
            next(self)


def json_objects(file: TextIO) -> Iterator[tuple[int, dict | str]]:
    """Yield (line number, object, or the reason why the line is none) of each line that is not blank."""
    for line, text in enumerate(file, start=1):
        record: object = None
        with suppress(ValueError, RecursionError):
            record = json.loads(text)
        if record is None:
            text = text.strip("\ufeff\r\n\t ")  # a byte order mark within a file: of files that were joined
            if not text:
                continue
            with suppress(ValueError, RecursionError):
                record = json.loads(text) if text.startswith("{") else None
        yield line, record if isinstance(record, dict) else "malformed_row"


def parsed(
    parse: Callable[[_Entry], CaptionRow | None], entries: Iterable[_Entry], place: str, split: str | None = None
) -> Iterator[CaptionRow]:
    """Parse each entry of a JSON file into a row, or into nothing.

    An entry that `parse` cannot read, whatever it raises (a missing field, a list for an id, a NUL in a name), counts
    as malformed_row: one bad entry must not end a run over a million good ones.
    place: "captions.json: image", which the number of the entry follows.
    """
    for number, entry in enumerate(entries):
        try:
            row = parse(entry)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            row = CaptionRow(f"{place} {number}", split=split, reason="malformed_row")
        if row is not None:
            yield row


def read_json(path: Path, flag: str) -> object:
    """Return the content of a JSON file, bad bytes as surrogates; InputError where it is not JSON."""
    asked = f"{flag} {path}"
    not_json = raised_as(
        lambda fault: InputError(f"{asked} is not JSON, or was cut short: {fault}"), ValueError, RecursionError
    )
    with readable(asked), not_json, open_text(path) as file:
        return json.load(file)


def shape_of(content: object) -> str:
    """Describe the content of a JSON file that is not of the expected form."""
    return f"keys {', '.join(content)[:80]}" if isinstance(content, dict) and content else f"a {type(content).__name__}"
