#!/usr/bin/env bash
# Creates .venv and runs the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
prepare_venv tests/requirements.txt
# Three workers share two cores, as a third of the time tests wait for processes that they started. Each test uses one
# thread, the threads of launched runs sleep while they wait for a core, and nothing may access a hub.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest -n 3 --dist worksteal --durations=10 "$@"
