"""The size of the code: the rows of CONTRIBUTING's table that can be counted, and the longest files and functions.

python launch/house.py [FOLDER OR FILE ...]; without one: lib and the scripts beside it.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "lib"
SHOWN = 10
LOSSES = ("infonce.py", "sigmoid.py", "tiles.py", "positives.py")


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


def longest(files: Sequence[Measured], functions: Sequence[Measured]) -> Iterator[str]:
    """Lines to print about the longest files and functions."""
    for kind, found in (("files", files), ("functions", functions)):
        yield f"longest {kind} of {len(found)}"
        yield from (f"{each.lines:6,} {each.name}" for each in found[:SHOWN])
    if functions:
        yield f"median function: {median(each.lines for each in functions):g} lines"


def table() -> Iterator[str]:
    """Rows of CONTRIBUTING's table about this project."""
    files = sorted(LIB.rglob("*.py"))
    text = {file: file.read_text(encoding="utf-8").splitlines() for file in files}
    lines = sum(map(len, text.values()))
    comments = sum(line.lstrip().startswith("#") for each in text.values() for line in each)
    names = Counter(file.name for file in files if not file.name.startswith("__"))
    twice = sorted(name for name, count in names.items() if count > 1)
    root = [file for file in LIB.glob("*.py") if file.name != "__init__.py"]
    yield f"{len(root)} modules at the root of lib and {len(list(LIB.glob('*/__init__.py')))} packages"
    yield f"{len(files)} files and {lines:,} lines in lib"
    yield f"{sum(len(text[LIB / 'losses' / name]) for name in LOSSES):,} lines for the losses ({', '.join(LOSSES)})"
    yield f"{_parameters(LIB / 'gradcache' / 'step.py', 'cached_step')} parameters of the step function"
    yield f"{_fields(LIB / 'setup' / 'run.py', 'Run')} fields of Run"
    yield f"{len(twice)} file names used twice{': ' * bool(twice)}{', '.join(twice)}"
    yield f"{comments / lines:.1%} of the lines are comments"


def _parameters(file: Path, name: str) -> int:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    arguments = next(node.args for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    return len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])


def _fields(file: Path, name: str) -> int:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    body = next(node.body for node in nodes if isinstance(node, ast.ClassDef) and node.name == name)
    return sum(isinstance(node, ast.AnnAssign) for node in body)


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    places = [Path(each) for each in arguments]
    if not places:
        print(*table(), sep="\n")
    print(*longest(*measure(places or [LIB, *ROOT.glob("*.py")])), sep="\n")


def _python_files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        yield from place.rglob("*.py") if place.is_dir() else (place,)


def _name(file: Path) -> str:
    file = file.resolve()
    return str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)


if __name__ == "__main__":
    main(sys.argv[1:])
