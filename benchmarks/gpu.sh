#!/bin/bash
# Everything that a machine with a GPU is for, without a network, in two parts that write into one folder:
#
#   benchmarks/gpu.sh first [--dry-run] [OUT]     4 minutes: build, every kernel, the tests and the shapes that say most
#   benchmarks/gpu.sh rest  [--dry-run] [OUT]     10 minutes, afterwards: all tests and cases, the peers, the sanitizer
#
# default OUT: accumloss-gpu. Results are written after every case, into at most eight files; what a part is killed in
# leaves those of before.
#
#   PYTHON           the interpreter that has torch with CUDA; default: python3
#   PEER_WHEELS      a folder with wheels, at most 64 MiB, of liger-kernel and what else rest compares with; installed
#                    beside, not into the environment
#   BENCH_SECONDS    for bench_gpu.py; default: 45 in first, 210 in rest
#
# --dry-run, on a machine without a GPU: resolves every command, runs what can be run there (bench_gpu.py --dry-run among
# it) and keeps the limits. Ends with a line for each step; exit status 1 if one failed, 2 if something is missing.
set -uo pipefail

part=${1:-}
case $part in first | rest) shift ;; *) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
is_dry=
if [ "${1:-}" = --dry-run ]; then is_dry=1; shift; fi
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-accumloss-gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-python3}
peers=$(mktemp -d)
trap 'rm -rf "$peers"' EXIT
cd "$peers" || exit 2  # not among the sources, which would hide the installed package
export PYTHONPATH="$peers${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PATH="$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
failed=0
summary=()
total=240  # seconds of everything
if [ "$part" = rest ]; then total=600; fi
log="$out/log.txt"

# seconds_left RESERVE: of the total, never negative
seconds_left() {
  local left=$((total - SECONDS - ${1:-0}))
  echo $((left > 0 ? left : 0))
}

note() { summary+=("$(printf '%-24s %4d s  from %3d s  %s' "$1" "$2" "$3" "$4")"); }

# step NAME SECONDS COMMAND...: at most so long, and not beyond what is left. A failure of a step that is named with a
# "?" behind is noted and fails nothing.
step() {
  local name=${1%\?} limit=$2 begin=$SECONDS status line gates=1
  [ "$name" = "$1" ] || gates=
  shift 2
  local left
  left=$(seconds_left)
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name, at most $limit s" | tee -a "$log"
  if [ "$limit" -eq 0 ]; then
    note "$name" 0 "$begin" "FAILED: no time was left"
    failed=1
    return
  fi
  timeout --kill-after=5 "$limit" "$@" > >(tee -a "$log") 2>&1
  status=$?
  line=ok
  if [ $status -eq 124 ] || [ $status -eq 137 ]; then line="over $limit s"; elif [ $status -ne 0 ]; then line="exit status $status"; fi
  if [ $status -ne 0 ]; then
    if [ $gates ]; then line="FAILED: $line"; failed=1; else line="to be looked at, see the log: $line"; fi
  fi
  note "$name" $((SECONDS - begin)) "$begin" "$line"
}

# --- what is missing, before anything is done

missing=()
needs() { missing+=("$1"); }
probe='
import importlib.metadata as m, re, sys
def number(text): return [int(x) for x in re.findall(r"\d+", text)[:2]]
for wanted in sys.argv[1:]:
    name, least = wanted.split(":")
    try:
        found = m.version(name)
    except m.PackageNotFoundError:
        print(f"{name} >= {least}: not installed in {sys.executable}")
        continue
    if number(found) < number(least):
        print(f"{name} >= {least}: {found} is installed in {sys.executable}")
'
if ! command -v "$python" > /dev/null; then
  needs "$python: not found; PYTHON names the interpreter that has torch"
else
  while read -r why; do needs "$why"; done < <("$python" -c "$probe" torch:2.10 pytest:8 setuptools:77 pybind11:2.12 numpy:1)
  while read -r why; do note without 0 "$SECONDS" "$why"; done < <("$python" -c "$probe" transformers:4.57 matplotlib:3)
  why=$("$python" -c "
import sys; sys.path.insert(0, '$root/build_tools'); import native
sys.exit(' '.join(native.missing_requirements()) or 0)" 2>&1) || needs "$why"
fi
if [ -n "${PEER_WHEELS:-}" ]; then
  bytes=$(cat "$PEER_WHEELS"/*.whl 2> /dev/null | wc -c)
  [ "$bytes" -gt 0 ] || needs "PEER_WHEELS=$PEER_WHEELS: holds no wheel"
  [ "$bytes" -le $((64 << 20)) ] || needs "PEER_WHEELS=$PEER_WHEELS: expected at most 64 MiB, got $((bytes >> 20))"
fi
if [ ! $is_dry ]; then
  for command in nvcc nvidia-smi; do
    command -v "$command" > /dev/null || needs "$command: not found"
  done
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2> /dev/null \
    || needs "a GPU that $python's torch can use: torch.cuda.is_available() is false"
fi
if [ "$part" = rest ] && ! grep -q "^end of first" "$log" 2> /dev/null; then
  needs "$log of gpu.sh first: run that before, into the same folder"
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "gpu.sh $part: missing:"
  printf '  %s\n' "${missing[@]}"
  exit 2
fi

# --- the steps

[ "$part" = rest ] || : > "$log"
echo "gpu.sh $part${is_dry:+ --dry-run}: $total s in all, $(date -u +%FT%TZ)" >> "$log"
tests=("$python" -m pytest -c "$root/pyproject.toml" -q --durations=5 "$root/tests/cuda/test_on_gpu.py")
# What a first run has to show: the values of every plan, the same bits again, graphs, streams, bad labels; of the head
# the product into fp32 and the count that nobody waits for.
most="(plan_matches and bfloat16 and (odd or all_options)) or repeats or graph or stream or (bad_label and (short or cluster)) or cuda_head"
if [ $is_dry ]; then
  # without a GPU the module skips itself, and pytest reports 5: nothing collected
  tests=(bash -c '"$@"; status=$?; [ $status -eq 5 ] || exit $status' -- "${tests[@]}")
  for command in nvcc nvidia-smi compute-sanitizer; do  # here they need not be
    printf '%-20s %s\n' "$command" "$(command -v "$command" || echo missing here)" | tee -a "$log"
  done
  dry=(--dry-run --rounds 1)
else
  nvidia-smi >> "$log" 2>&1
  dry=()
fi
benchmark=("$python" "$root/benchmarks/bench_gpu.py" "${dry[@]}" --out "$out")

# bench NAME SECONDS RESERVE ARGUMENTS...: no new case begins after that time; the start and the last case take theirs.
bench() {
  local seconds=$2 more=20 left
  [ ! $is_dry ] || more=120
  left=$(seconds_left $(($3 + more)))
  [ "$seconds" -le "$left" ] || seconds=$left
  step "$1" $((seconds + more)) "${benchmark[@]}" --seconds "$seconds" "${@:4}"
}

if [ "$part" = first ]; then
  if [ $is_dry ]; then
    step "modules" 60 "$python" -c 'import torch, pytest, pybind11, setuptools, accumloss'
    step "every kernel" 60 "$python" "$root/tests/cuda/every_kernel.py" --list
  else
    # for the GPU that is here alone: each architecture more takes its time again
    arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || exit 2
    step "build" 110 env TORCH_CUDA_ARCH_LIST="$arch" ACCUMLOSS_CUDA=ON \
      "$python" -m pip install --no-build-isolation --no-deps --force-reinstall "$root"
    step "every kernel" 30 "$python" "$root/tests/cuda/every_kernel.py"
  fi
  step "tests that say most" 45 "${tests[@]}" -k "$most"
  bench "benchmark" "${BENCH_SECONDS:-45}" 5 --first
else
  if [ -n "${PEER_WHEELS:-}" ]; then
    step "peers?" 60 "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$peers" "$PEER_WHEELS"/*.whl
  fi
  step "tests on CUDA" 150 "${tests[@]}"
  if [ $is_dry ]; then
    step "head and loss" 120 "$python" "$root/benchmarks/bench_linear.py" --quick --rounds 1 --dtypes bf16 --out "$out"
  else
    step "head and loss" 90 "$python" "$root/benchmarks/bench_linear.py" --device cuda --rounds 7 --dtypes bf16 --out "$out"
  fi
  bench "benchmark" "${BENCH_SECONDS:-210}" 75 --resume
  if [ $is_dry ] || "$python" -c 'import matplotlib' 2> /dev/null; then
    step "picture" 40 "$python" "$root/benchmarks/plot.py" "$out/gpu.csv"
  fi
  # Last, and no failure of ours: racecheck may not know bulk copies and clusters. Our kernels alone, not torch's.
  if [ $is_dry ]; then
    step "calls of the sanitizer" 60 "$python" "$root/tests/cuda/every_kernel.py" --list
  elif command -v compute-sanitizer > /dev/null; then
    for tool in memcheck synccheck racecheck; do
      step "$tool?" 60 compute-sanitizer --tool "$tool" --kernel-regex kns=accumloss --error-exitcode 1 \
        --launch-timeout 60 "$python" "$root/tests/cuda/every_kernel.py"
    done
  else
    note "sanitizer" 0 "$SECONDS" "not run: compute-sanitizer was not found"
  fi
fi
echo
printf '%s\n' "${summary[@]}" | tee -a "$log"
echo "end of $part after $SECONDS s" | tee -a "$log"
exit $failed
