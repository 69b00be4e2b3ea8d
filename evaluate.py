"""Measure a model: `python evaluate.py TASK --model RUN --data DATA --output-dir OUT`; TASK --help lists its flags.

Runs on one process, or on several under `accelerate launch` or `torchrun`.
"""

import sys
from collections.abc import Sequence

import tyro

from lib.config.arguments import parse
from lib.errors import InputError, on_rank_0, one_line_errors
from lib.evaluation.tasks import Task

FLAT = (tyro.conf.OmitArgPrefixes,)
"""--data instead of --data.data, for the flags of the group `data`"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for faulty input."""
    try:
        options = parse(Task, arguments, told=on_rank_0(), description=__doc__, config=FLAT)
        options.check()
        # Imported late: torch and transformers take seconds, and neither --help nor a wrong flag should wait for them.
        from lib.evaluation.measure import carry_out

        carry_out(options)
    except InputError as fault:
        if on_rank_0():
            print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
