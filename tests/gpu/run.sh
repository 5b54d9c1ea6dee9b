#!/usr/bin/env bash
# All that needs a GPU, in ten minutes: builds and installs, runs the test suite on it, has compute-sanitizer watch the
# kernels, and times them. Prints a table last; the exit status is 1 when any of it failed or ran out of time.
#
#   tests/gpu/run.sh [FOLDER]        FOLDER for results: default $OUT, else benchmarks/results
#
#   PYTHON=python3       the Python to install into, with torch for CUDA, setuptools, ninja, pybind11, pytest, hypothesis
#   STAGES="install suite cuda memcheck racecheck initcheck synccheck bench"      what to do; in a run of its own
#                        "install tune", which races the planner's candidates and fits its constants to this GPU
#   TOTAL=580            seconds in all; each stage has a budget of its own within them, and bench has 60 for sure
#   BENCH_ARGS="--quick --compile --compile-budget 40"      of benchmarks/bench.py; its --budget and --json are set here
set -u -o pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
results=${1:-${OUT:-$root/benchmarks/results}}
python=${PYTHON:-python3}
stages=${STAGES:-install suite cuda memcheck racecheck initcheck synccheck bench}
total=${TOTAL:-580}
bench_args=${BENCH_ARGS:---quick --compile --compile-budget 40}
mkdir -p "$results" && results=$(cd "$results" && pwd)
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
log=$results/gpu-log.txt
table=()
failed=0
export PYTHONUNBUFFERED=1

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "fastnorm: $python's torch sees no GPU here." >&2
  exit 2
}
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then  # for this GPU alone
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST
fi
: >"$log"

# stage NAME BUDGET PATTERN COMMAND...: runs it within BUDGET seconds and what is left in all; the table gets the last
# line of its output that has PATTERN.
stage() {
  local name=$1 budget=$2 pattern=$3 began=$SECONDS status text verdict
  shift 3
  case " $stages " in *" $name "*) ;; *) return ;; esac
  local left=$((total - SECONDS))
  case "$name $stages " in bench\ *) ;; *" bench "*) left=$((left - 60)) ;; esac
  [ "$budget" -gt "$left" ] && budget=$left
  if [ "$budget" -lt 5 ]; then
    table+=("$(printf '%-10s %-11s %4s s  %s' "$name" "not started" 0 "no time left")")
    failed=1
    return
  fi
  echo "==== $name: $*" | tee -a "$log"
  # To a file, not a pipe: a process left behind would keep it open.
  (cd "$root/tests" && timeout --signal=INT --kill-after=10 "$budget" "$@") >"$log.stage" 2>&1
  status=$?
  cat "$log.stage" >>"$log"
  [ "$status" -ne 0 ] && tail -n 40 "$log.stage"
  text=$(grep -E "$pattern" "$log.stage" | tail -n 1)
  rm -f "$log.stage"
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="out of time" ;;
    *) verdict="failed ($status)" ;;
  esac
  [ "$status" -ne 0 ] && failed=1
  table+=("$(printf '%-10s %-11s %4s s  %s' "$name" "$verdict" $((SECONDS - began)) "${text:0:110}")")
}

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
pytest=("$python" -m pytest . -q -p no:cacheprovider --backend cuda --maxfail 200 "--junitxml=$results/gpu-suite.xml")

# From the folder tests, where Python finds the installed fastnorm and not the checkout's.
stage install 200 'Successfully installed|error' "$python" -m pip install --no-build-isolation --no-deps --force-reinstall "$root"
stage suite 200 ' in [0-9.]+s' "${pytest[@]}" "${workers[@]}" -m "not cuda"
pytest=("${pytest[@]/gpu-suite/gpu-cuda}")
stage cuda 90 ' in [0-9.]+s' "${pytest[@]}" -m cuda

# Only our kernels are watched, where the tool can tell kernels apart.
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)}
watched=()
if [ -n "$sanitizer" ]; then
  if "$sanitizer" --help 2>&1 | grep -q -- '--kernel-name '; then watched=(--kernel-name kns=fastnorm)
  elif "$sanitizer" --help 2>&1 | grep -q -- '--kernel-regex '; then watched=(--kernel-regex kns=fastnorm)
  fi
fi
for tool in memcheck racecheck initcheck synccheck; do
  # Every tensor an allocation of its own: reading past its end is then seen.
  stage $tool 60 'ERROR SUMMARY|RACECHECK SUMMARY|cases,|not found' env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "${sanitizer:-compute-sanitizer}" --tool $tool "${watched[@]}" --error-exitcode 9 --print-limit 20 \
    "$python" gpu/sanitize.py --seconds 25
done

left=$((total - SECONDS - 15))
stage tune "$left" 'Measured over estimated|Ceilings' "$python" "$root/benchmarks/tune.py" \
  --budget $((left > 120 ? left - 60 : left / 2)) --json "$results/gpu-tune.json" --markdown "$results/gpu-tune.md"

left=$((total - SECONDS - 15))
stage bench $((left > 30 ? left : 30)) 'geometric|torch\.nn' "$python" "$root/benchmarks/bench.py" --device cuda $bench_args \
  --budget $((left > 120 ? 60 : left > 60 ? left / 2 : 20)) --json "$results/gpu-bench.json" --markdown "$results/gpu-bench.md"

sed -n '/^==== \(tune\|bench\): /,$p' "$log" | sed 1d
echo
"$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)'
printf '%s\n' "${table[@]}"
echo "in $results: $(cd "$results" && ls gpu-* | tr '\n' ' ')"
exit $failed
