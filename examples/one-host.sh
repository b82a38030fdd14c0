#!/bin/bash
# One study on all GPUs of this host without Ray: a process a GPU, all of them on one study.
#
#   examples/one-host.sh --model cogvideox-2b --n-trials 32
#
# Options are those of `sparsetune tune`. Ctrl-C ends all of them; the same command goes on.

set -euo pipefail
set -m # without job control, what runs in the background is deaf to Ctrl-C

num_gpus=$(nvidia-smi --list-gpus | wc -l)
mkdir -p mlruns
processes=()
for ((gpu = 0; gpu < num_gpus; gpu++)); do
    CUDA_VISIBLE_DEVICES=$gpu sparsetune tune --storage journal:mlruns/study.log "$@" 2> >(sed "s/^/GPU $gpu: /" >&2) &
    processes+=("$!")
done
trap 'kill -INT "${processes[@]}" 2>/dev/null || true' INT TERM

# The status is the first one that isn't 0: 3, say, where no trial met the gate.
status=0
for process in "${processes[@]}"; do
    ended=0
    wait "$process" || ended=$?
    while kill -0 "$process" 2>/dev/null; do # Ctrl-C ended the waiting, and not yet the process
        ended=0
        wait "$process" || ended=$?
    done
    if ((status == 0)); then status=$ended; fi
done
exit "$status"
