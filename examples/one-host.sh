#!/bin/bash
# One study on all GPUs of this host without Ray: one process per GPU.
#
#   examples/one-host.sh --model cogvideox-2b --n-trials 32
#
# Takes the options of `sparsetune tune`. Ctrl-C stops all processes; the same command resumes the study.

set -euo pipefail
set -m # without job control, background processes ignore Ctrl-C

num_gpus=$(nvidia-smi --list-gpus | wc -l)
mkdir -p mlruns
processes=()
for ((gpu = 0; gpu < num_gpus; gpu++)); do
    CUDA_VISIBLE_DEVICES=$gpu sparsetune tune --storage journal:mlruns/study.log "$@" 2> >(sed "s/^/GPU $gpu: /" >&2) &
    processes+=("$!")
done
trap 'kill -INT "${processes[@]}" 2>/dev/null || true' INT TERM

# Exit with the first status other than 0, e.g. 3 if no trial met the gate.
status=0
for process in "${processes[@]}"; do
    ended=0
    wait "$process" || ended=$?
    while kill -0 "$process" 2>/dev/null; do # Ctrl-C interrupted `wait`, but the process still runs
        ended=0
        wait "$process" || ended=$?
    done
    if ((status == 0)); then status=$ended; fi
done
exit "$status"
