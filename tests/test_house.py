"""launch/house.py: how it counts files, functions and their lengths."""

import subprocess
import sys

from conftest import ROOT

SCRIPT = ROOT / "launch" / "house.py"
SOURCE = """
import functools


def one(): return 1


class Outer:
    @functools.cache
    def two(
        self,
    ):
        def inner():
            return 1

        return inner
"""


def measured(*arguments: str) -> list[str]:
    finished = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return finished.stdout.splitlines()


def test_lengths_are_those_counted_by_hand(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "long.py").write_text(SOURCE)
    (tmp_path / "code" / "empty.py").write_text("")
    (tmp_path / "code" / "notes.txt").write_text("no code\n" * 99)
    file = tmp_path / "code" / "long.py"
    assert measured(str(tmp_path / "code")) == [
        "longest files of 2",
        f"    16 {file}",
        f"     0 {tmp_path / 'code' / 'empty.py'}",
        "longest functions of 3",
        f"     7 {file}:10 two",
        f"     2 {file}:13 inner",
        f"     1 {file}:5 one",
        "median function: 2 lines",
    ]


def test_without_a_place_it_measures_this_project():
    lines = measured()
    assert any(line.endswith("lib/train.py") or "lib/gradcache/step.py" in line for line in lines)
    assert not any(" tests/" in line for line in lines)
