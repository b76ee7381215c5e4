#!/usr/bin/env bash
# The comparisons of docs/study.md and docs/stability.md, from the repository's root, with drpo on the path. Resumable:
# what is done is not done again. About three hours on two cores; results.json of each goes to studies/results/NAME.json.
set -euo pipefail
out=${1:-runs/study}
common=(--seeds 0 1 2 --learning-rate 2e-5 --prompts 8 --steps 16 --schedule constant --sampling.max-new-tokens 16
        --eval-problems 100 --eval-every 8)
six=(none 'ppo(0.2,0.28)' 'spo(12.5)' 'dppo(0.15)' 'drpo(12.5)' 'drpo(0.2)')
stale=(--updates 8 --rollout-precision fp8_weights)
chain='reasoning_gym("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, system=None)'

drpo compare demo --objectives "${six[@]}" "${common[@]}" "${stale[@]}" --out "$out/addition"
drpo compare demo --objectives "${six[@]}" "${common[@]}" --updates 2 --rollout-precision auto --out "$out/addition"
drpo compare demo --objectives "${six[@]}" "${common[@]}" --updates 4 --rollout-precision fp8_weights \
     --task "$chain" --reward exact_number --out "$out/chain_sum"
drpo compare demo --objectives 'drpo(0.2,outside=0.15)' 'drpo(0.2,advantage_weighted=False)' "penalty('k3',0.08)" \
     "${common[@]}" "${stale[@]}" --out "$out/ablations"
python studies/stability.py --seeds 0 1 2 --out "$out/lab"
python studies/stability.py --seeds 0 1 2 --objectives 'drpo(0.02)' 'drpo(0.05)' 'drpo(0.6)' 'drpo(0.3,power=0.5)' 'spo(0.5)' \
     --updates 16 --rollout-precision fp32 --out "$out/radii"
# What is named in advance: 40 to 80 trainings, on seeds that the benchmark has not.
python studies/stability.py --seeds 10 11 12 13 14 15 16 17 18 19 --objectives none 'ppo(0.2,0.28)' 'drpo(0.2)' 'dppo(0.15)' \
     --updates 16 --learning-rate 2e-3 --rollout-precision fp32 --claims studies/results/sixteen_updates.claims.toml --out "$out/sixteen"

for name in addition chain_sum ablations; do
    cp "$out/$name/results.json" "studies/results/$name.json"
done
cp "$out/lab/stability/results.json" studies/results/stability.json
cp "$out/radii/stability/results.json" studies/results/radii.json
cp "$out/sixteen/stability/results.json" studies/results/sixteen_updates.json
python studies/figures.py
