"""The two kinds of failure that are told in one line: what the user gave, and what went wrong on the way."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A fault in a flag, a file or a data set: names the value and the remedy. Exit code 2."""


class RunError(RuntimeError):
    """A fault in the middle of a run: names the step and what is safe. Exit code 1."""

    def __init__(self, message: str, *, of_one_rank: bool = False) -> None:
        super().__init__(message)
        self.of_one_rank = of_one_rank
        """Only the rank that met it knows: it is told from there."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn both kinds into one line on stderr and an exit code; other errors keep their traceback."""
    try:
        yield
    except (InputError, RunError) as error:
        if int(os.environ.get("RANK", "0")) == 0 or getattr(error, "of_one_rank", False):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
