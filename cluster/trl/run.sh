#!/usr/bin/env bash
# cluster/trl/run.sh qwen3_4b METHOD [--FIELD VALUE ...]: a setting with DRPO or one of its baselines, on one node.
# METHOD is drpo, drpo-tight, dppo, spo, ppo or none. Several nodes: see README.md here.
set -euo pipefail
setting=${1:?setting: a file of this folder without .yaml, such as qwen3_4b}
method=${2:?method: drpo, drpo-tight, dppo, spo, ppo or none}
shift 2
here=$(dirname "$0")
case $method in
    drpo) objective='drpo(12.5)' ;;  # the paper's radius: a tilt of the weights, no boundary
    drpo-tight) objective='drpo(0.2)' ;;  # one that tokens can reach
    dppo) objective='dppo(0.15)' ;;
    spo) objective='spo(12.5)' ;;
    ppo) objective='ppo(0.2, 0.28)' ;;
    none) objective='none' ;;
    *) echo "run.sh: unknown method '$method': drpo, drpo-tight, dppo, spo, ppo or none" >&2; exit 2 ;;
esac
if [ ! -f "$here/$setting.yaml" ]; then
    echo "run.sh: no $here/$setting.yaml; there are: $(cd "$here" && ls -- *.yaml | grep -v fsdp | sed 's/\.yaml//' | tr '\n' ' ')" >&2
    exit 2
fi
read -ra launch <<< "${LAUNCH:-accelerate launch --config_file $here/fsdp2.yaml}"
exec "${launch[@]}" "$here/train.py" --config "$here/$setting.yaml" \
    --objective "$objective" --output_dir "runs/trl-$setting-$method" "$@"
