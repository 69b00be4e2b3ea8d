#!/usr/bin/env bash
# Runs the ranks of one machine, one for each GPU: bash launch/node.sh train_siglip.py --config FILE ...
# torchrun starts them (DDP), or accelerate launch if ACCELERATE_CONFIG names a file of accelerate_configs/.
#
# Environment variables, with defaults: RANKS on this machine (its GPUs), NODES (1), NODE_RANK (0), MASTER_ADDR and
# MASTER_PORT of machine 0, ACCELERATE_CONFIG (none), ACCELERATE_MIXED_PRECISION (no), VENV (.venv, if it exists).
# SIGTERM, SIGUSR1 and SIGHUP are passed to the ranks as USR1, because torchrun kills them 30 seconds after a SIGTERM.
# Exit code 75: stopped by a signal before the last step; start the same command with --resume auto again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [[ $# -eq 0 || ! -f $1 ]]; then
    echo "error: the script ${1:-} does not exist; use: bash launch/node.sh train_siglip.py [flags]" >&2
    exit 2
fi
venv=${VENV:-.venv}
[[ -d $venv/bin ]] && PATH=$venv/bin:$PATH

nodes=${NODES:-1} node_rank=${NODE_RANK:-0} ranks=${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if ((ranks == 0)); then
    echo "error: $(hostname) has no GPU; use RANKS=2 ACCELERATE_USE_CPU=true for two ranks on the CPU" >&2
    exit 2
fi
master=${MASTER_ADDR:-127.0.0.1} port=${MASTER_PORT:-29500}
if [[ -n ${ACCELERATE_CONFIG:-} ]]; then
    launcher=(accelerate launch --config_file "$ACCELERATE_CONFIG" --num_machines "$nodes" --machine_rank "$node_rank"
        --num_processes $((nodes * ranks)) --main_process_ip "$master" --main_process_port "$port")
else
    launcher=(torchrun --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$ranks"
        --master-addr "$master" --master-port "$port")
fi
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%s\n' "${launcher[*]} $*"
    exit 0
fi

stopped=
# shellcheck disable=SC2329  # the trap calls it
pass_on() {
    stopped=yes
    # The ranks are the launcher's only children. Before they exist, the signal ends the launcher itself.
    pkill -USR1 -P "$process" || kill -TERM "$process"
}
trap pass_on TERM USR1 HUP
"${launcher[@]}" "$@" &
process=$!
wait "$process"
code=$?
while kill -0 "$process" 2>/dev/null; do # a signal ends `wait`, not the launcher
    wait "$process"
    code=$?
done
[[ -n $stopped && $code -ne 0 ]] && exit 75
exit "$code"
