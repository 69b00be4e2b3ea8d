#!/usr/bin/env bash
# Tests and measures the project on one GPU, without a network; nine minutes on an H200 with 16 cores:
#
#   bash benchmarks/gpu.sh [--toy]
#
# Smoke checks, ViT-B/32 and ViT-B/16 against 32,768 pairs in bf16, peers, losses, the loader, a 24 GB budget: see
# benchmarks/gpu.py. Every stage adds to gpu.json, in $OUT if that is set, else in benchmarks/results; --toy runs all
# stages at toy size on a CPU and writes gpu_toy.json. WHEELS names a folder of wheels to install first, PYTHON the
# interpreter (python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
exec "$python" benchmarks/gpu.py --output "${OUT:-benchmarks/results}" "$@"
