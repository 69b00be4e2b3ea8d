#!/usr/bin/env bash
# Sets up .venv with what training and evaluation need: bash launch/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
prepare_venv requirements.txt
cat <<'MESSAGE'
.venv is ready. Next, with your pictures in my_pictures/<class>/ or your captions in a table:
    .venv/bin/accelerate launch train_siglip.py --data my_pictures --hold-out 0.1 --model google/siglip-base-patch16-224 --lr 1e-5 --effective-batch 256 --xbm-size 0 --output-dir runs/mine
Without pictures at hand: bash launch/demo.sh
MESSAGE
