#!/usr/bin/env bash
# Creates .venv, trains SigLIP on the embedded handwritten digits, evaluates it: bash launch/demo.sh [siglip|clip]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
loss=${1:-siglip}
if [[ ! -f train_$loss.py ]]; then
    echo "error: train_$loss.py does not exist; use: bash launch/demo.sh [siglip|clip]" >&2
    exit 2
fi
source launch/venv.sh
prepare_venv requirements.txt
installed=$SECONDS

run=runs/demo_$loss
rm -rf "$run"
.venv/bin/python "train_$loss.py" --config "configs/digits_$loss.yaml" --output-dir "$run"
.venv/bin/python evaluate.py zeroshot --model "$run/export" --data digits --output-dir "$run/zeroshot"

cat <<MESSAGE

loss curve  $run/loss_curve.png
report      $run/zeroshot/report.html
model       $run/export (load it with transformers.AutoModel.from_pretrained)
time        $SECONDS s, including $installed s for the installation
MESSAGE
