# Shared by the sweeps: `run NAME FLAGS...` trains into $out/NAME unless that run is finished, and goes
# on with it where it was interrupted. PYTHON chooses the interpreter; DRY_RUN=1 prints the commands alone.
# `scripts/sweep_….sh --help` prints the head of the script.
case ${1:-} in -h | --help)
  sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"
  exit 0
  ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}

# Compares runs, if there are any.
compare() {
  [ "${DRY_RUN:-}" = 1 ] || "$python" scripts/compare_runs.py "$@"
}

run() {
  local name=$1
  shift
  local words=(main.py --output_dir "$out/$name" "$@")
  if grep -qs "^Max " "$out/$name/train_eval_results.txt"; then
    echo "$out/$name is finished: kept"
    return
  elif [ -e "$out/$name/last.pt" ]; then
    words=(main.py --resume --output_dir "$out/$name")
  fi
  if [ "${DRY_RUN:-}" = 1 ]; then
    echo "$python ${words[*]}"
  else
    "$python" "${words[@]}"
  fi
}
