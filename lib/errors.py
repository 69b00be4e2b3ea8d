"""What ends a script in one line and an exit code: a fault of what the user gave, one on the way, or a stop."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr

SECONDS_FOR_RANK_0 = 5.0


class InputError(ValueError):
    """A fault in a flag, a file or a data set: names the value and the remedy. Exit code 2."""


class RunError(RuntimeError):
    """A fault in the middle of a run: names the step and what is safe. Exit code 1."""

    def __init__(self, message: str, *, of_one_rank: bool = False) -> None:
        super().__init__(message)
        self.of_one_rank = of_one_rank
        """Only the rank that met it knows: it is told from there."""


class StoppedEarly(Exception):
    """A signal ended the run before its last step: the same command with --resume auto goes on. Exit code 75.

    That is EX_TEMPFAIL of sysexits.h, "try again later", by which launch/ and schedulers start a job again.
    """


@contextmanager
def raised_as(make: Callable[[Exception], Exception], *faults: type[Exception]) -> Iterator[None]:
    """Raise faults of these types as the error that `make` returns for them; errors of this file pass unchanged.

    `with raised_as(lambda fault: InputError(f"--config {path} cannot be read ({fault})"), OSError): ...`
    """
    try:
        yield
    except (InputError, RunError, StoppedEarly):
        raise
    except faults as fault:
        raise make(fault) from fault


def on_rank_0() -> bool:
    """Whether this process is the one that tells what all ranks have met."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def silenced(wanted: bool) -> Iterator[None]:
    """Where wanted, nothing goes to stderr: tyro tells a malformed value there whatever its console_outputs."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere) if wanted else nullcontext():
        yield


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn these into one line on stderr and an exit code; other errors keep their traceback.

    What all ranks have met is told by rank 0, whom the others leave the time for it: launchers end all ranks as soon as
    one has ended. Printing to a reader that went away, as in `--help | head`, ends the script with code 1 and no word.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be UTF-8, and is printed with escapes then
    with _ended_by_a_closed_pipe():
        try:
            yield
        except (InputError, RunError, StoppedEarly) as error:
            word = "stopped" if isinstance(error, StoppedEarly) else "error"
            if on_rank_0() or getattr(error, "of_one_rank", False):
                print(f"{word}: {error}", file=sys.stderr)
            else:
                time.sleep(SECONDS_FOR_RANK_0)
            sys.exit({InputError: 2, RunError: 1, StoppedEarly: 75}[type(error)])
        except SystemExit as ended:  # tyro's, of a command line that it cannot read
            if ended.code and not on_rank_0():
                time.sleep(SECONDS_FOR_RANK_0)
            raise


@contextmanager
def _ended_by_a_closed_pipe() -> Iterator[None]:
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own last flush meets it again
        sys.exit(1)
