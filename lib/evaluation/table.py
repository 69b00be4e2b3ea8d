"""The task table: the figures of several runs and evaluations, gathered from their files."""

import csv
import io
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lib.distributed import rank_and_world_size
from lib.errors import InputError, raised_as
from lib.evaluation.report import Rows, aligned, decimals, words
from lib.evaluation.tasks import Table
from lib.files import write_text
from lib.runs.reporter import SUMMARY

METRICS = "metrics.json"
FIGURES = (
    *("accuracy", "top5", "macro_precision", "macro_recall", "macro_f1", "mean_entropy"),
    *("R@1", "R@5", "R@10", "MRR", "median_rank"),
)
OF_TRAINING = ("steps", "wall_seconds")


class Result(NamedTuple):
    """Figures of a folder, and what they are of: a classifier, a direction, a temperature, a compared model."""

    folder: str
    of: str
    figures: dict[str, float]


def table(options: Table) -> None:
    """Print the tables, and write them to --output-dir if it is given."""
    if rank_and_world_size()[0] > 0:
        return
    results = _results_of_all(options.runs)
    tables = [_rows(kind, options.mean) for kind in _by_kind(results)]
    print("\n\n".join(map(aligned, tables)))
    if options.output_dir:
        files = options.output_dir / "table.md", options.output_dir / "table.csv"
        write_text(files[0], "\n".join(map(_markdown, tables)))
        _write_csv(results, files[1])
        print(f"\ntables: {files[0]}, {files[1]}")


def _results_of_all(runs: Sequence[Path]) -> list[Result]:
    """Results of all folders; warns of each folder without any, InputError if all are without."""
    found = {run: results_of(run) for run in runs}
    empty = [run for run, results in found.items() if not results]
    empty_because = f"holds no results: no {METRICS} or {SUMMARY} with figures that table knows"
    if len(empty) == len(found):
        raise InputError(f"{empty[0]} {empty_because}: name a folder of evaluate.py or of a training script")
    for run in empty:
        print(f"warning: {run} {empty_because}: it is left out", file=sys.stderr)
    return [result for results in found.values() for result in results]


def results_of(run: Path) -> list[Result]:
    """Results of a folder: evaluations in it and one level below, and the last validation of a training."""
    files = [run / SUMMARY, run / METRICS, *sorted(run.glob(f"*/{METRICS}"))]
    return [result for file in files if file.is_file() for result in _read(file)]


def _read(file: Path) -> list[Result]:
    """The results of one file; InputError if it cannot be read."""
    advice = "run the evaluation again, or leave the folder out"
    faults = (OSError, ValueError, KeyError, AttributeError)
    with raised_as(lambda fault: InputError(f"{file} cannot be read: {fault!r}; {advice}"), *faults):
        content = json.loads(file.read_text(encoding="utf-8"))
        folder = str(file.parent)
        if file.name == METRICS:
            return [Result(folder, of, figures) for of, figures in _figures(content)]
        training = {key: content[key] for key in OF_TRAINING}
        validated = list(_figures(content.get("eval", {}))) or [("", {})]
        return [Result(folder, f"training {of}".strip(), figures | training) for of, figures in validated]


def _figures(content: dict, of: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """(name, figures) of the topmost dictionaries with figures; those below them are of classes or of prompts."""
    found = {key: content[key] for key in FIGURES if isinstance(content.get(key), int | float)}
    if found:
        yield of, found
        return
    for name, inner in content.items():
        if isinstance(inner, dict):
            yield from _figures(inner, f"{of} {'' if name == 'models' else name}".strip())


def _by_kind(results: Iterable[Result]) -> list[list[Result]]:
    """Results with the same kinds of figures, which share a table."""
    kinds: dict[tuple, list[Result]] = {}
    for result in results:
        kinds.setdefault(tuple(result.figures), []).append(result)
    return list(kinds.values())


def _rows(results: Sequence[Result], mean: bool) -> Rows:
    columns = list(results[0].figures)
    rows = [["results", "of", *map(words, columns)]]
    rows += [[each.folder, each.of, *map(decimals, each.figures.values())] for each in results]
    for of, alike in groupby(sorted(results, key=lambda each: each.of), key=lambda each: each.of):
        values = list(zip(*(each.figures.values() for each in alike), strict=True))
        if mean and len(values[0]) > 1:
            for name, function in (("mean", statistics.fmean), ("standard deviation", statistics.stdev)):
                rows.append([name, of, *(decimals(float(function(column))) for column in values)])
    return rows


def _markdown(rows: Rows) -> str:
    head, *body = ("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body, ""])


def _write_csv(results: Sequence[Result], path: Path) -> None:
    """Write all results in one table, with empty cells for missing figures."""
    columns = [key for key in (*FIGURES, *OF_TRAINING) if any(key in each.figures for each in results)]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["results", "of", *columns])
    writer.writeheader()
    writer.writerows({"results": each.folder, "of": each.of} | each.figures for each in results)
    write_text(path, text.getvalue())
