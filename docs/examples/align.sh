#!/bin/bash
# align.sh: `bash align.sh` submits three jobs. Submitted again, they do only what is missing.
#SBATCH --job-name=align --nodes=1 --ntasks-per-node=1 --cpus-per-task=32 --gpus-per-node=8 --time=08:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@120
set -euo pipefail
model=./my-model data=prefs.jsonl heldout=heldout.jsonl work=align workers=16 # workers: 2 or more

if [ $# -eq 0 ]; then # on the login node
    scored=$(sbatch --parsable --array="0-$((workers - 1))" --gpus-per-node=1 --cpus-per-task=4 "$0" precompute)
    trained=$(sbatch --parsable --dependency="afterok:$scored" --kill-on-invalid-dep=yes "$0" train)
    sbatch --dependency="afterok:$trained" --kill-on-invalid-dep=yes --gpus-per-node=1 --cpus-per-task=4 "$0" evaluate
    exit
fi

# SLURM signals this shell only. It passes SIGTERM on, at which dpocli saves, writes its status and ends.
time_is_up=no child=
trap 'time_is_up=yes; kill -TERM "$child" || true' USR1
trap 'kill -TERM "$child" || true' TERM # scancel means it, and a job that SLURM preempts it requeues by itself

requeue() {
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    exit 75
}

run() { # run STATUS_FILE COMMAND...
    local status_file=$1 code=0 state
    shift
    if [ "$time_is_up" = yes ]; then requeue; fi
    "$@" &
    child=$!
    while kill -0 "$child" 2> /dev/null; do wait "$child" || true; done # a trap ends `wait` early
    wait "$child" || code=$?
    [ "$code" -ne 0 ] || return 0
    state=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$status_file" || true)
    if [ "$time_is_up" = yes ] && { [ "$state" = preempted ] || [ "$code" -eq 75 ]; }; then requeue; fi
    exit "$code"
}

case $1 in
precompute) # small parts, since a stop loses the one that is open
    shard=$SLURM_ARRAY_TASK_ID
    run "$work/ref-heldout/status-$shard-of-$workers.json" dpocli precompute --model "$model" --data "$heldout" \
        --out "$work/ref-heldout" --shard "$shard/$workers" --rows-per-part 1024
    run "$work/ref/status-$shard-of-$workers.json" dpocli precompute --model "$model" --data "$data" \
        --out "$work/ref" --shard "$shard/$workers" --rows-per-part 1024
    ;;
train)
    read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    run "$work/run/status.json" srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
        --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --shutdown-timeout=110 \
        --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" \
        -m dpocli train --model "$model" --reference "$work/ref" --eval-reference "$work/ref-heldout" \
        --out "$work/run" --loss dpo --beta 0.1 --batch-size 128 --epochs 1
    ;;
evaluate)
    run "$work/report/status.json" dpocli evaluate --model "$work/run/model" --reference "$work/ref-heldout" \
        --out "$work/report"
    ;;
esac
