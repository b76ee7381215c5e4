#!/usr/bin/env bash
# One node's part of a run: the first starts Ray, waits for the others and trains; they serve until its Ray is gone.
#   HEAD=ADDRESS_OF_THE_FIRST RANK=0 NODES=2 cluster/verl/node.sh qwen3-30b-a3b drpo [verl's own arguments]
# slurm.sh and skypilot.yaml set the three. JOIN_SECONDS (600) is how long the nodes wait for each other.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if (($# < 2)); then
    exec "$here/run.sh" "$@"  # says what there is
fi
for name in HEAD RANK NODES; do
    if [[ -z "${!name:-}" ]]; then
        echo "node.sh: $name is not set; it needs HEAD, RANK and NODES" >&2
        exit 2
    fi
done
limit=${JOIN_SECONDS:-600} pause=${POLL_SECONDS:-10}
export RAY_ADDRESS="$HEAD:6379"

if ((RANK > 0)); then
    until ray start --address="$RAY_ADDRESS" --disable-usage-stats; do
        if ((SECONDS >= limit)); then
            echo "node.sh: node $RANK found no Ray at $RAY_ADDRESS in $limit s" >&2
            exit 1
        fi
        sleep "$pause"
    done
    while ray status >/dev/null 2>&1; do sleep "$pause"; done
    ray stop
    exit 0
fi

ray start --head --node-ip-address="$HEAD" --port=6379 --disable-usage-stats
trap 'ray stop' EXIT
count='import ray; ray.init(log_to_driver=False); print(sum(node["Alive"] for node in ray.nodes()))'
until n=$(python -c "$count" | tail -n 1) && ((n >= NODES)); do
    if ((SECONDS >= limit)); then
        echo "node.sh: ${n:-0} of NODES=$NODES nodes joined Ray in $limit s" >&2
        exit 1
    fi
    sleep "$pause"
done
"$here/run.sh" "$1" "$2" "trainer.nnodes=$NODES" "${@:3}"
