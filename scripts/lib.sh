# Shared by the sweeps: `run NAME FLAGS...` trains into $out/NAME unless that run is finished, and goes
# on with it where it was interrupted. PYTHON chooses the interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}

run() {
  local name=$1
  shift
  if grep -qs "^Max " "$out/$name/train_eval_results.txt"; then
    echo "$out/$name is finished: kept"
  elif [ -e "$out/$name/last.pt" ]; then
    "$python" main.py --resume --output_dir "$out/$name"
  else
    "$python" main.py --output_dir "$out/$name" "$@"
  fi
}
