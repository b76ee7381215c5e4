#!/usr/bin/env bash
# One of the DRPO paper's settings with one method, on the Ray cluster that this machine belongs to (or is).
#   cluster/verl/run.sh qwen3-4b drpo [verl's own arguments]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
names() { (cd "$1" && ls -- *.yaml | sed 's/\.yaml$//' | grep -vx -e paper -e dense -e moe | tr '\n' ' '); }
if (($# < 2)); then
    echo "usage: $0 SETTING METHOD [ARGUMENTS]" >&2
    echo "  SETTING: $(names "$here/config")" >&2
    echo "  METHOD:  $(names "$here/config/objective")" >&2
    exit 2
fi
setting=$1 method=$2
shift 2
exec python -m drpo.adapters.verl --config-dir "$here/config" --config-name "$setting" "objective=$method" \
    "here=$here" "trainer.experiment_name=$setting-$method" "$@"
