#!/usr/bin/env bash
# Creates .venv and checks lint, format and types: bash launch/check.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
prepare_venv tests/requirements.txt
.venv/bin/python -m ruff check
.venv/bin/python -m ruff format --check
.venv/bin/python -m mypy
