#!/usr/bin/env bash
# Train one network with every layer, then compare the runs. Further flags go to every run, e.g.
#   scripts/sweep_layers.sh --model resnet18 --dataset digits --num_epochs 5 --batch_size 32
# OUT chooses the folder (default Output/sweep_layers), PYTHON the interpreter;
# DRY_RUN=1 prints the commands alone.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
out=${OUT:-Output/sweep_layers}

for layer in $("$python" -c "from layers import LAYERS; print(*LAYERS)"); do
  run "$layer" --layer "$layer" "$@"
done
compare "$out"/* --picture "$out/curves.png"
