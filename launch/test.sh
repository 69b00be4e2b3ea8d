#!/usr/bin/env bash
# Creates .venv and runs the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
prepare_venv tests/requirements.txt
# Two workers share two cores: each test uses one thread, the threads of launched runs sleep while they wait for a core,
# and nothing may access a hub.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest -n 2 --dist worksteal --durations=10 "$@"
