"""The bytes of docs/scaling.md equal those that the code sends, with one process in a world of eight ranks."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_a_rank_gives_the_bytes_of_the_formulas(loss):
    n, q, d, ranks = 64, 16, 12, 8
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), f"--measure={loss}:{ranks}"]
    sizes = [f"--effective-batch={n}", f"--xbm-size={q}", f"--embed-dim={d}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True, env=environment)
    given = json.loads(finished.stdout.splitlines()[-1])
    # The text anchors' log-sum-exp and log-count, and the log-sum-exps of remembered anchors of both towers, in float64
    of_losses = 16 * n + 16 * q if loss == "infonce" else 0
    assert given["all_gather"] == (8 * d + 24) * n // ranks + of_losses
    assert given["all_reduce"] == 4 * n * d + 12  # the texts' gradient; loss, scale and bias
