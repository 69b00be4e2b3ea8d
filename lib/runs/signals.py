"""Stop signals: a signal sets a flag, and all ranks agree on it between steps or, in long ones, between chunks."""

import os
import signal
import threading
from collections.abc import Callable
from math import ceil

import torch

from lib.distributed import sum_counts
from lib.errors import StoppedEarly, heard_signals, received

SECONDS_BETWEEN_LOOKS = 2.0  # a look is one small reduction: often enough for a 30-second grace, too rare to cost
SECONDS_UNTIL_TOLD = 25.0  # torchrun kills 30 s after SIGTERM, Kubernetes too


class StepGivenUp(Exception):
    """A rank received a stop signal in the middle of a step: all ranks abandon it at the same chunk."""


class StopSignal:
    """Within it stop signals, as a first Ctrl-C, only set a flag; `look` and the loop make the ranks agree on it.

    resume_hint: says what to resume from; printed where stopping takes longer than a grace period may be.
    """

    def __init__(self, device: torch.device, resume_hint: Callable[[], str]) -> None:
        self.received = bool(received)
        """A signal came to this rank."""
        self.obeyed = False
        """All ranks have left the loop for it."""
        self._device, self._resume_hint = device, resume_hint
        self._looks_due, self._every = 0, 1
        self._timer = threading.Timer(SECONDS_UNTIL_TOLD, self._tell)
        self._timer.daemon = True

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in heard_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def look(self) -> None:
        """Raise StepGivenUp on all ranks if any received a stop signal; called between chunks, on all ranks.

        Most calls return at once: the ranks reduce their flags about every two seconds, as `pace` estimates.
        """
        self._looks_due += 1
        if self._looks_due >= self._every:
            self._looks_due = 0
            if sum_counts([int(self.received)], self._device)[0]:
                raise StepGivenUp

    def pace(self, seconds: float, chunks: int) -> None:
        """Estimate how many chunks go by between looks, from a step's seconds and chunks, the same on all ranks."""
        self._looks_due = 0
        self._every = max(1, ceil(SECONDS_BETWEEN_LOOKS * chunks / max(seconds, 1e-6)))

    def _note(self, number: int, _: object) -> None:
        if self.received and number == signal.SIGINT:
            raise StoppedEarly("at once, by a second Ctrl-C")
        if not self.received:
            self._timer.start()
            # Not print: the signal may have come in the middle of one.
            _on_local_rank_0(f"{signal.Signals(number).name}: stopping; what was learned is saved first")
        self.received = True

    def _tell(self) -> None:
        _on_local_rank_0(
            f"stopping takes longer than {SECONDS_UNTIL_TOLD:.0f} s; if killed meanwhile: {self._resume_hint()}"
        )


def _on_local_rank_0(words: str) -> None:
    """A line on stderr, below a progress bar."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"\n{words}\n".encode())
