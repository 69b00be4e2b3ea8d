"""How large the code is: the longest files and functions, and the median length of a function.

python launch/house.py [FOLDER OR FILE ...]; without one: lib and the scripts beside it.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 10


class Measured(NamedTuple):
    """Something with lines: a file, or a function in one."""

    lines: int
    name: str


def measure(places: Sequence[Path]) -> tuple[list[Measured], list[Measured]]:
    """Files and functions, methods and inner functions among them, the longest first; decorators do not count."""
    files, functions = [], []
    for file in sorted(_python_files(places)):
        text, name = file.read_text(encoding="utf-8"), _name(file)
        files.append(Measured(len(text.splitlines()), name))
        for node in ast.walk(ast.parse(text, str(file))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                functions.append(Measured(node.end_lineno - node.lineno + 1, f"{name}:{node.lineno} {node.name}"))
    return sorted(files, reverse=True), sorted(functions, reverse=True)


def told(files: Sequence[Measured], functions: Sequence[Measured]) -> Iterator[str]:
    """What is printed, line by line."""
    for kind, found in (("files", files), ("functions", functions)):
        yield f"longest {kind} of {len(found)}"
        yield from (f"{each.lines:6,} {each.name}" for each in found[:SHOWN])
    if functions:
        yield f"median function: {median(each.lines for each in functions):g} lines"


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    places = [Path(each) for each in arguments] or [ROOT / "lib", *ROOT.glob("*.py")]
    print(*told(*measure(places)), sep="\n")


def _python_files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        yield from place.rglob("*.py") if place.is_dir() else (place,)


def _name(file: Path) -> str:
    file = file.resolve()
    return str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)


if __name__ == "__main__":
    main(sys.argv[1:])
