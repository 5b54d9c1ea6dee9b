#!/usr/bin/env bash
# All that needs a GPU: builds, has compute-sanitizer watch the kernels, stresses them, runs the test suite, and times
# them. Prints a table last; the exit status is 1 when any of it failed or ran out of time.
#
#   tests/gpu/run.sh [FOLDER]        FOLDER for results: default $OUT, else benchmarks/results
#
# The checks run side by side, because most of their time is the host's; the benchmarks come after them, alone. Where a
# GPU is lent for ten minutes a call and fifteen in all, two calls do everything:
#
#   tests/gpu/run.sh                            the first: everything but the benchmarks, in nine minutes at most
#   STAGES="bench" TOTAL=240 tests/gpu/run.sh   the second, on the machine that still has the build; on a fresh one
#                                               STAGES="build bench" TOTAL=280, or bring fastnorm/_C.*.so along
#
# With more time, on a call of its own: STAGES="build tune" races the planner's candidates and fits its constants to
# this GPU.
#
#   PYTHON=python3       the Python to build for, with torch for CUDA and what requirements-dev.txt names to build and to
#                        test with; tests of which a package is missing fail, and the others run
#   STAGES="build first memcheck racecheck initcheck synccheck stress cuda suite compile"
#                        what to do, and `tune` and `bench`; always in the order of this file
#   TOTAL=540            seconds in all; each stage has a budget of its own within them
#   TUNE_ARGS, BENCH_ARGS="--quick --compile --compile-budget 40"
#                        of benchmarks/tune.py and bench.py; their --budget and --json are set here
#   SUITE_ARGS           of pytest, which runs the suite
set -u -o pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
results=${1:-${OUT:-$root/benchmarks/results}}
python=${PYTHON:-python3}
stages=${STAGES:-build first memcheck racecheck initcheck synccheck stress cuda suite compile}
total=${TOTAL:-540}
read -r -a bench_args <<<"${BENCH_ARGS:---quick --compile --compile-budget 40}"
read -r -a tune_args <<<"${TUNE_ARGS:-}"
read -r -a suite_args <<<"${SUITE_ARGS:-}"
mkdir -p "$results" && results=$(cd "$results" && pwd)
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
log=$results/gpu-log.txt
table=()
failed=0
export PYTHONUNBUFFERED=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export FASTNORM_LINEINFO=1            # compute-sanitizer's reports name lines
export OMP_NUM_THREADS=1              # the checks share the processors
export TORCHINDUCTOR_COMPILE_THREADS=1  # each of pytest's workers would start as many processes as there are cores

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "fastnorm: $python's torch sees no GPU here." >&2
  exit 2
}
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then  # for this GPU alone
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST
fi
: >"$log"

wanted() { case " $stages " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
left() { echo $((total - SECONDS)); }

# start NAME BUDGET PATTERN COMMAND...: runs it beside the others, within BUDGET seconds and what is left in all. The
# table gets the last two lines of its output that have PATTERN.
names=() patterns=()
start() {
  local name=$1 budget=$2 pattern=$3
  shift 3
  wanted "$name" || return 0
  [ "$budget" -gt "$(left)" ] && budget=$(left)
  names+=("$name") patterns+=("$pattern")
  rm -f "$log.$name.status"
  echo "==== $name: $*" >"$log.$name"
  [ "$budget" -lt 5 ] && return
  (
    began=$SECONDS
    cd "$root/tests" || exit
    # To a file, not a pipe: a process left behind would keep it open.
    timeout --signal=INT --kill-after=10 "$budget" "$@" >>"$log.$name" 2>&1
    echo "$? $((SECONDS - began))" >"$log.$name.status"
  ) &
}

# Waits for all that was started, and tells how it ended.
finish() {
  local i name status seconds verdict text
  wait
  for i in "${!names[@]}"; do
    name=${names[i]} status=none seconds=0
    [ -e "$log.$name.status" ] && read -r status seconds <"$log.$name.status"
    case $status in
      none) verdict="not started" ;;
      0) verdict=passed ;;
      124 | 137) verdict="out of time" ;;
      *) verdict="failed ($status)" ;;
    esac
    text=$(grep -E "${patterns[i]}" "$log.$name" | tail -n 2 | tr '\n' ' ')
    [ "$verdict" = passed ] || { failed=1 && tail -n 40 "$log.$name"; }
    table+=("$(printf '%-10s %-11s %4s s  %s' "$name" "$verdict" "$seconds" "${text:0:150}")")
    cat "$log.$name" >>"$log"
    rm -f "$log.$name" "$log.$name.status"
  done
  names=() patterns=()
}

stage() {
  start "$@"
  finish
}

stage build 150 'built|error' "$python" "$root/setup.py" --quiet build_ext --inplace

# What may fail at the first launch on a new device or driver, before anything else does.
stage first 30 '^(large )?cluster: ' "$python" gpu/first.py

# Only our kernels are watched, where the tool can tell kernels apart. (initcheck then does not know what torch's have
# written, and takes copies of that for reads of uninitialized memory: it is not to look at copies.)
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)}
watched=() copies=()
if [ -n "$sanitizer" ]; then
  help=$("$sanitizer" --help 2>&1)  # as a whole: a pipe that grep leaves early fails
  case $help in
    *--kernel-name*) watched=(--kernel-name kns=fastnorm) ;;
    *--kernel-regex*) watched=(--kernel-regex kns=fastnorm) ;;
  esac
  case $help in *--check-api-memory-access*) copies=(--check-api-memory-access no) ;; esac
fi
for tool in memcheck racecheck initcheck synccheck; do
  options=("${watched[@]}")
  [ $tool = initcheck ] && options+=("${copies[@]}")
  # Every tensor an allocation of its own: reading past its end is then seen.
  start $tool 90 'ERROR SUMMARY|RACECHECK SUMMARY|cases,|not found' env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "${sanitizer:-compute-sanitizer}" --tool $tool "${options[@]}" --error-exitcode 9 --print-limit 20 \
    "$python" gpu/sanitize.py --seconds 40
done

start stress 120 '^stress|^grids' "$python" gpu/stress.py --iterations 2000 --seconds 110

# The tests of CUDA alone: their files are named, because collecting all takes half a minute; and a file has one worker,
# because each test of test_cuda_large.py needs 60 GB.
mapfile -t cuda_files < <(cd "$root/tests" && grep -l 'mark\.cuda' test_*.py)
workers=() file_workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 10) file_workers=(-n 4 --dist loadfile); fi
# pytest_stage NAME BUDGET ARGUMENTS...
pytest_stage() {
  local name=$1 budget=$2
  shift 2
  start "$name" "$budget" ' in [0-9.]+s' \
    "$python" -m pytest -q -p no:cacheprovider --backend cuda --maxfail 200 --durations 5 "--junitxml=$results/gpu-$name.xml" "$@"
}
pytest_stage cuda 150 "${cuda_files[@]}" "${file_workers[@]}" -m cuda
# One activation stands for the others where gradients are differentiated numerically; the CPU's tests have them all.
pytest_stage suite 240 . "${workers[@]}" "${suite_args[@]}" -m "not cuda" --ignore test_compile.py -k "not test_gradcheck.py or silu"
pytest_stage compile 180 test_compile.py -m "not cuda"
finish

stage tune "$(left)" 'Measured over estimated|Ceilings|refused' "$python" "$root/benchmarks/tune.py" \
  "${tune_args[@]}" --budget $(($(left) > 120 ? $(left) - 60 : $(left) / 2)) --json "$results/gpu-tune.json" --markdown "$results/gpu-tune.md"

stage bench "$(left)" 'geometric|torch\.nn|refused' "$python" "$root/benchmarks/bench.py" --device cuda "${bench_args[@]}" \
  --budget $(($(left) > 120 ? 60 : $(left) > 60 ? $(left) / 2 : 20)) --json "$results/gpu-bench.json" --markdown "$results/gpu-bench.md"

sed -n '/^==== \(tune\|bench\): /,$p' "$log" | sed 1d
echo
"$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)'
printf '%s\n' "${table[@]}"
echo "in $results: $(cd "$results" && ls gpu-* | tr '\n' ' ')"
exit $failed
