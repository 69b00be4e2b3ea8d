"""Errors that end a script with one line and an exit code: faults of the input, of the machine, or a stop."""

import errno
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from types import FrameType

from lib.files import fault_of, hide_secrets_in_output

SECONDS_FOR_RANK_0 = 5.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Ways in which a scheduler, a person or a terminal that closes ends a run."""
_ROOM, _RIGHTS, _FAILING = "make room, or name another folder", "name another folder", "see to the disk"
_REMEDY = {
    errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EFBIG: _ROOM, errno.EROFS: _RIGHTS, errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS, errno.EIO: _FAILING, errno.ESTALE: _FAILING,
}  # fmt: skip
# safetensors and tokenizers, written in Rust, and torch raise errors of their own where a file cannot be written.
_RUST = re.compile(r"^(.*)\(os error (\d+)\)", re.DOTALL)
_TORCH = re.compile(r"PytorchStreamWriter failed|inline_container")
_WORKER = "DataLoader worker (pid"

received: list[int] = []
"""The stop signal received outside the training loop; kept because Python drops exceptions raised in destructors."""


class InputError(ValueError):
    """A fault in a flag, a file or a data set: names the value and the remedy. Exit code 2."""


class RunError(RuntimeError):
    """A fault in the middle of a run: names the step and what is safe. Exit code 1."""

    def __init__(self, message: str, *, of_one_rank: bool = False) -> None:
        super().__init__(message)
        self.of_one_rank = of_one_rank
        """Only one rank knows of it, so that rank prints it."""


class StoppedEarly(BaseException):
    """A signal ended the run before its last step; the same command with --resume auto resumes it. Exit code 75.

    That is EX_TEMPFAIL of sysexits.h, "try again later": launch/ and schedulers then start the job again. Like
    KeyboardInterrupt it is not an Exception: it is raised anywhere at start-up, and no library may swallow it.
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


def readable(asked: str) -> AbstractContextManager[None]:
    """A context whose faults of the file system are an InputError: `asked`, as "--data a.csv", cannot be read."""
    return raised_as(lambda fault: InputError(f"{asked} cannot be read: {fault_of(fault)}"), OSError)


def on_rank_0() -> bool:
    """True on the rank that prints errors shared by all ranks."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def silenced(wanted: bool) -> Iterator[None]:
    """Discard stderr where wanted: tyro prints malformed values there whatever its console_outputs."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere) if wanted else nullcontext():
        yield


@contextmanager
def machine_errors_reported(standing: Callable[[], str] | None = None) -> Iterator[None]:
    """Raise a full or failing disk and a lost data worker as RunError.

    standing: returns the checkpoint to resume from, in words; every RunError and StoppedEarly ends with them.
    """
    try:
        yield
    except (Exception, StoppedEarly) as error:
        fault = error if isinstance(error, RunError | StoppedEarly) else _machine_fault(error)
        if fault is None or isinstance(error, InputError) or (fault is error and standing is None):
            raise
        if standing is not None:
            fault.args = (f"{fault}; {standing()}",)
        raise fault from fault.__cause__ or (None if fault is error else error)


def _machine_fault(error: BaseException) -> RunError | None:
    """A RunError for a fault of the disk or of a data worker; None for any other error."""
    words = str(error)
    in_rust = _RUST.search(words)
    number = getattr(error, "errno", None) or (int(in_rust[2]) if in_rust else None)
    if number in _REMEDY or _TORCH.search(words):
        reason = in_rust[1].strip() if in_rust else words.strip().split("\n")[0]
        return RunError(f"the disk refuses a file ({reason}): {_REMEDY.get(number or 0, _ROOM)}", of_one_rank=True)
    if _WORKER in words:
        return RunError(
            "a data worker was killed, or ran out of memory or of /dev/shm: lower --workers, or give the machine or "
            f"its container more ({words.strip().split('. ')[0]})",
            of_one_rank=True,
        )
    return None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a script: print errors of the input and of the machine, and stops, as one line; exit with their code.

    Other errors keep their traceback. Rank 0 prints errors shared by all ranks; the others wait for it, because
    launchers end all ranks as soon as one has ended. Printing into a closed pipe, as in `--help | head`, exits with 1
    silently. Passwords and tokens in addresses are never printed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths that are not UTF-8 are printed with escapes
    hide_secrets_in_output()
    with _ended_by_a_closed_pipe(), ExitStack() as undone:
        try:
            with _stopped_by_signals(undone), machine_errors_reported():
                yield
        except (InputError, RunError, StoppedEarly) as error:
            word = "stopped" if isinstance(error, StoppedEarly) else "error"
            if on_rank_0() or getattr(error, "of_one_rank", False):
                print(f"{word}: {error}", file=sys.stderr)
            else:
                time.sleep(SECONDS_FOR_RANK_0)
            sys.exit(75 if isinstance(error, StoppedEarly) else 2 if isinstance(error, InputError) else 1)
        except SystemExit as ended:  # by tyro, for a command line that it cannot parse
            if ended.code and not on_rank_0():
                time.sleep(SECONDS_FOR_RANK_0)
            raise


def heard_signals() -> list[signal.Signals]:
    """STOP_SIGNALS, without SIGHUP where it is ignored, as nohup requests."""
    hidden = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and hidden)]


@contextmanager
def _stopped_by_signals(undone: ExitStack) -> Iterator[None]:
    """Raise StoppedEarly when a stop signal arrives; further signals are ignored.

    undone: restores the handlers at the end of the script.
    """

    def stop(number: int, _: FrameType | None) -> None:
        if not received:
            received.append(number)
            raise StoppedEarly(f"by {signal.Signals(number).name}")

    undone.callback(received.clear)
    for number in heard_signals():
        undone.callback(signal.signal, number, signal.signal(number, stop) or signal.SIG_DFL)
    try:
        yield
    except Exception as error:
        if received and not isinstance(error, InputError):  # caused by the end of another rank, or by stopping
            raise StoppedEarly(f"by {signal.Signals(received[0]).name}") from error
        raise


@contextmanager
def _ended_by_a_closed_pipe() -> Iterator[None]:
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python's last flush fails again
        sys.exit(1)
