"""launch/house.py: how it counts files, functions and their lengths."""

import re
import subprocess
import sys

from conftest import ROOT

import lib.train
import train_siglip

LIB = f"{ROOT}/lib/"
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


def test_contributing_lists_the_files_that_a_step_runs(tmp_path, monkeypatch):
    """Between the call of the cached step and the end of the update, on one process."""
    ran: set[str] = set()

    def note(frame, event: str, _: object) -> None:
        if event != "call":
            return
        if frame.f_code.co_name == "_remember":  # the rest of the run is not watched
            sys.setprofile(None)
        elif (file := frame.f_code.co_filename).startswith(LIB):
            ran.add(file.removeprefix(f"{ROOT}/"))

    def watched(cache, chunks, *given, **options):
        chunks = list(chunks)  # how data is read is another way
        sys.setprofile(note)
        return cached_step(cache, chunks, *given, **options)

    cached_step = lib.train.cached_step
    monkeypatch.setattr("lib.train.cached_step", watched)
    flags = ["--effective-batch=8", "--chunk-size=4", "--xbm-size=8", "--xbm-start=1", "--steps=2", "--eval-every=0"]
    train_siglip.main([*flags, "--save-every=0", f"--output-dir={tmp_path / 'run'}"])
    page = (ROOT / "CONTRIBUTING.md").read_text().split("## The way of a batch")[1].split("\n## ")[0]
    opened, passed = page.split("A step also passes")
    named = [set(re.findall(r"`(lib/[\w/]+\.py)`", part)) for part in (opened, passed)]
    assert ran == named[0] | named[1] and len(named[0]) <= 12 and not named[0] & named[1]
