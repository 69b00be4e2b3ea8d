"""What a task found, in the forms that evaluate.py writes: figures, facts, tables and pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.data.evaluation_set import EvaluationSet
from lib.evaluation.embed import Embedded, counted

Rows = Sequence[Sequence[str]]
"""A table for people: the head, then the lines."""

MOST_LISTED = 50  # rows of a list in the report


class Picture(NamedTuple):
    """A PNG file of the report and what it shows."""

    title: str
    path: Path


@dataclass(frozen=True)
class Outcome:
    """What a task found."""

    metrics: dict
    """the content of metrics.json"""
    facts: dict[str, str]
    """what was measured, for people"""
    tables: dict[str, Rows]
    """figures for people, the first table the shortest"""
    draw: Callable[[Path], list[Picture]]
    """writes the pictures into a folder"""


def figure(value: float | int) -> str:
    """A number of a table: four decimals, none for a count."""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def data_facts(data: EvaluationSet, embedded: Embedded) -> dict[str, str]:
    """What was measured on, and how much of it could not be."""
    facts = {"data": data.name, "images": str(int(embedded.valid.sum()))}
    skipped = [*data.skipped, *embedded.skipped]
    if skipped:
        facts["skipped"] = f"{len(skipped)} ({counted(reason for _, reason in skipped)})"
    return facts


def skipped_table(data: EvaluationSet, embedded: Embedded) -> dict[str, Rows]:
    """What could not be read, and why; no table where all could."""
    skipped = [*data.skipped, *embedded.skipped]
    if not skipped:
        return {}
    more = [["…", f"{len(skipped) - MOST_LISTED} more"]] if len(skipped) > MOST_LISTED else []
    return {"Skipped": [["what", "why"], *map(list, skipped[:MOST_LISTED]), *more]}
