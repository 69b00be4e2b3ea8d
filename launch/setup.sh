#!/usr/bin/env bash
# Creates .venv with the packages for training and evaluation: bash launch/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
prepare_venv requirements.txt
cat <<'MESSAGE'
.venv is ready. Next, train on your images in my_pictures/<class>/ (or on a table of captions: --data captions.csv):
    .venv/bin/accelerate launch train_siglip.py --data my_pictures --hold-out 0.1 --model google/siglip-base-patch16-224 --output-dir runs/mine
Without your own images: bash launch/demo.sh
MESSAGE
