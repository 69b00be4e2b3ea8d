"""Records of a table's file: cells of CSV and TSV, objects of JSON lines; a line that is none has a reason."""

import csv
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TextIO

_MOST_LINES = 200
"""Lines that a quoted cell may have: bounds the work that one lost quotation mark makes."""
_LONGEST_HEADER = 2**20
_QUOTE = '"'

Cells = list[str]


class Delimited:
    """Rows of a CSV or TSV file, which begins with the names of its columns.

    Reads strictly (RFC 4180): a row has as many cells as the header, empty ones at its end aside, and nothing follows
    the end of a quoted cell. In TSV files, where most programs quote nothing, a mark that does not quote in this
    way is a character like any.
    """

    def __init__(self, file: TextIO, suffix: str):
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses captions above 128 KiB
        self._lines = _Lines(file)
        first = self._lines.first().replace("\r", " ")
        self.delimiter = _delimiter_of(first, "\t" if suffix == ".tsv" else ",")
        self._opens = re.compile(f"(?:^|{self.delimiter}){_QUOTE}")
        self.header: Cells = next(csv.reader((first,), delimiter=self.delimiter), [])

    def rows(self, is_row: Callable[[Cells], bool]) -> Iterator[tuple[int, Cells | str]]:
        """(line number, cells, or the reason why the line is no row) of each line that is not blank.

        is_row: whether cells look like a row of this table; a quoted cell that holds such lines was never closed, and
        they are rows.
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
        """Whether the row has as many cells as the header; empty ones beyond these are removed."""
        while len(cells) > len(self.header) and not cells[-1].strip():
            cells.pop()
        return len(cells) == len(self.header)

    def _quoted(self, line: str, is_row: Callable[[Cells], bool]) -> Cells | str:
        """The cells of a line with quotation marks, and of the lines after it where a quoted cell goes on there."""
        line = line.replace("\r", " ")
        try:
            return next(csv.reader((line,), delimiter=self.delimiter, strict=True))
        except csv.Error:
            cells, lines, goes_on = self._over_lines(line, is_row)
        if cells is not None and self._fits(cells):
            self._lines.skip(lines)
            return cells
        if self.delimiter == "\t":
            return line.split("\t")
        return "unclosed_quote" if goes_on else "malformed_row"

    def _over_lines(self, line: str, is_row: Callable[[Cells], bool]) -> tuple[Cells | None, int, bool]:
        """(cells or None, how many further lines they take, whether a cell is open at the end of the first line)."""
        lines, goes_on = 0, False

        def fed() -> Iterator[str]:
            nonlocal lines, goes_on
            yield line + "\n"
            goes_on = True
            for further in self._lines.ahead(_MOST_LINES):
                if self._begins_row(further, is_row):
                    return
                lines += 1
                yield further.replace("\r", " ") + "\n"

        with suppress(csv.Error):
            return next(csv.reader(fed(), delimiter=self.delimiter, strict=True)), lines, goes_on
        return None, 0, goes_on

    def _begins_row(self, line: str, is_row: Callable[[Cells], bool]) -> bool:
        """Whether a line within a quoted cell is a row of its own."""
        marks = line.count(_QUOTE)
        if not marks:
            return is_row(line.split(self.delimiter))
        if marks % 2 and not self._opens.search(line):
            return False  # it closes the cell
        cells = next(csv.reader((line.replace("\r", " "),), delimiter=self.delimiter))
        return is_row(cells + [""] * (len(self.header) - len(cells) if marks % 2 else 0))


class _Lines:
    """Lines of a file without their ends, some of which may be looked at before their turn."""

    def __init__(self, file: TextIO):
        self._file = file
        self._ahead: deque[str] = deque()
        self.number = 0
        """of the line that was given out last"""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else next(self._file).rstrip("\r\n")
        self.number += 1
        return line

    def first(self) -> str:
        """The first line that is not blank, "" if there is none; the beginning of a line that is no header."""
        while line := self._file.readline(_LONGEST_HEADER):
            self.number += 1
            if line.strip():
                return line.rstrip("\r\n")
        return ""

    def ahead(self, count: int) -> Iterator[str]:
        """The next lines, at most `count`, which stay where they are."""
        for place in range(count):
            if place == len(self._ahead):
                line = next(self._file, None)
                if line is None:
                    return
                self._ahead.append(line.rstrip("\r\n"))
            yield self._ahead[place]

    def skip(self, count: int) -> None:
        """Pass over lines that were looked at."""
        for _ in range(count):
            next(self)


def json_objects(file: TextIO) -> Iterator[tuple[int, dict | str]]:
    """(line number, object, or the reason why the line is none) of each line that is not blank."""
    for line, text in enumerate(file, start=1):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            text = text.strip("\ufeff\r\n\t ")
            if not text:
                continue
            record = _json(text) if text.startswith("{") else None
        yield line, record if isinstance(record, dict) else "malformed_row"


def _json(text: str) -> object:
    """The value, also behind a byte order mark, as of files that were joined; None where there is none."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _delimiter_of(header: str, usual: str) -> str:
    """The separator of cells: the usual of the file's suffix, or the one that the header has in its place."""
    return next((mark for mark in (usual, "\t", ";", ",") if mark in header), usual)
