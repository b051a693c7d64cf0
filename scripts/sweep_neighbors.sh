#!/usr/bin/env bash
# Train one network with several numbers of neighbors and several kinds of candidates, then compare.
# Further flags go to every run. KS chooses the numbers, OUT the folder, PYTHON the interpreter;
# DRY_RUN=1 prints the commands alone.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
out=${OUT:-Output/sweep_neighbors}

for k in ${KS:-1 4 9 16}; do
  run "K${k}_all" --layer ConvNN --K "$k" "$@"
  run "K${k}_random32" --layer ConvNN --K "$k" --sampling_type random --num_samples 32 "$@"
  run "K${k}_spatial6" --layer ConvNN --K "$k" --sampling_type spatial --num_samples 6 "$@"
done
compare "$out"/* --picture "$out/curves.png"
