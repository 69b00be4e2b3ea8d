#!/usr/bin/env bash
# All benchmarks on one GPU, sized for less than 8 minutes: bash benchmarks/gpu.sh [--toy] [RESULTS]
# ViT-B/32 and ViT-B/16 at 224 px in bfloat16, with and without torch.compile; losses up to N = 65536; a profile.
# Figures go to RESULTS (benchmarks/results/gpu), the page to RESULTS/README.md. --toy: the same at toy size, on a CPU too.
set -euo pipefail
cd "$(dirname "$0")/.."

toy=false
if [[ ${1:-} == --toy ]]; then toy=true && shift; fi
results=${1:-benchmarks/results/gpu}
python=${PYTHON:-python}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

run() { "$python" "benchmarks/$1.py" "${@:2}"; }

if $toy; then
    run step --subject narrow --sizes 32 --chunk-sizes 16 --repeats 1 --output "$results/step_narrow.json"
    run savings --subject narrow --size 32 --chunk-size 16 --repeats 1 --output "$results/savings.json"
    run loss --sizes 64 --dimensions 16 --repeats 1 --output "$results/loss.json"
    run profile_step --subject narrow --size 32 --chunk-size 16 --output "$results/profile_narrow.json"
else
    "$python" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "no GPU here: see --toy")'
    step=(--chunk-sizes 256 --largest-open-clip 4096 --largest-peer 4096)
    for subject in vit-b-32 vit-b-16; do
        run step --subject "$subject" "${step[@]}" --sizes 1024 4096 --repeats 2 --output "$results/step_$subject.json"
        run step --subject "$subject" "${step[@]}" --sizes 32768 --repeats 1 --output "$results/step_${subject}_32768.json"
        run step --subject "$subject" "${step[@]}" --sizes 4096 --repeats 2 --compile \
            --output "$results/step_${subject}_compiled.json"
    done
    run loss --sizes 4096 32768 65536 --dimensions 512 --largest-peer 32768 --largest-variant 32768 --repeats 3 \
        --output "$results/loss.json"
    run savings --subject vit-b-32 --size 4096 --chunk-size 256 --repeats 1 --output "$results/savings.json"
    run profile_step --subject vit-b-32 --size 4096 --chunk-size 256 --output "$results/profile_vit-b-32.json"
fi
run tables --results "$results" --output "$results/README.md"
