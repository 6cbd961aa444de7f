#!/bin/bash
# Everything that a machine with a GPU is for, in one command without a network and within 9 minutes: build, tests on
# CUDA, compute-sanitizer, benchmark against the peers, picture, one page.
#
#   benchmarks/gpu.sh [--dry-run] [OUT]      default OUT: accumloss-gpu
#
#   PYTHON           the interpreter that has torch with CUDA; default: python3
#   PEER_WHEELS      a folder with wheels of liger-kernel, quack-kernels and what they need; installed beside, not into
#                    the environment
#   BENCH_SECONDS    for bench_gpu.py; default: 210
#
# --dry-run, on a machine without a GPU: resolves every command, and runs what can be run there, bench_gpu.py --dry-run
# among it. Ends with a line for each step; exit status 1 if one failed.
set -uo pipefail

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
failed=0
summary=()
total=530  # seconds of everything

# step NAME SECONDS COMMAND...: at most so long, and not beyond what is left
step() {
  local name=$1 limit=$2 begin=$SECONDS status line
  shift 2
  [ "$limit" -le $((total - SECONDS)) ] || limit=$((total - SECONDS))
  echo "== $name"
  if [ "$limit" -gt 0 ]; then
    timeout --kill-after=5 "$limit" "$@" > >(tee -a "$out/log.txt") 2>&1
    status=$?
  else
    status=124
  fi
  line=ok
  if [ $status -eq 124 ]; then line="FAILED: over $limit s"; elif [ $status -ne 0 ]; then line="FAILED: exit status $status"; fi
  [ $status -eq 0 ] || failed=1
  summary+=("$(printf '%-24s %4d s  %s' "$name" $((SECONDS - begin)) "$line")")
}

: > "$out/log.txt"
export PATH="$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
if [ -n "${PEER_WHEELS:-}" ]; then
  step "peers" 60 "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$peers" "$PEER_WHEELS"/*.whl
fi

tests=("$python" -m pytest -c "$root/pyproject.toml" -q --durations=5 "$root/tests/cuda/test_on_gpu.py")

if [ $is_dry ]; then
  echo "== commands"
  for command in "$python" nvcc cmake ninja nvidia-smi compute-sanitizer; do  # here they need not all be
    printf '%-20s %s\n' "$command" "$(command -v "$command" || echo missing here)" | tee -a "$out/log.txt"
  done
  step "modules" 60 "$python" -c 'import torch, pytest, transformers, pybind11, setuptools, matplotlib, accumloss'
  # without a GPU the module skips itself, and pytest reports 5: nothing collected
  step "tests on CUDA" 120 bash -c '"$@"; status=$?; [ $status -eq 5 ] || exit $status' -- "${tests[@]}"
  step "calls of the sanitizer" 60 "$python" "$root/tests/cuda/every_kernel.py" --list
  step "benchmark" 480 "$python" "$root/benchmarks/bench_gpu.py" --dry-run --rounds 1 --seconds "${BENCH_SECONDS:-300}" --out "$out"
  step "picture" 60 "$python" "$root/benchmarks/plot.py" "$out/gpu.csv"
  step "head and loss" 120 "$python" "$root/benchmarks/bench_linear.py" --quick --rounds 1 --dtypes bf16 --out "$out"
else
  nvidia-smi >> "$out/log.txt" 2>&1
  # for the GPU that is here alone: three architectures would take three times as long
  arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || exit 2
  step "build" 240 env TORCH_CUDA_ARCH_LIST="$arch" ACCUMLOSS_CUDA=ON \
    "$python" -m pip install --no-build-isolation --no-deps --force-reinstall "$root"
  step "tests on CUDA" 180 "${tests[@]}"
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck synccheck; do
      step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 --launch-timeout 60 \
        "$python" "$root/tests/cuda/every_kernel.py"
    done
  else
    failed=1
    summary+=("compute-sanitizer        FAILED: not found")
  fi
  step "head and loss" 70 "$python" "$root/benchmarks/bench_linear.py" --device cuda --rounds 7 --dtypes bf16 --out "$out"
  left=$((total - SECONDS - 45))  # one case more, and the picture
  seconds=${BENCH_SECONDS:-210}
  [ "$seconds" -le $left ] || seconds=$left
  step "benchmark" $((seconds + 40)) "$python" "$root/benchmarks/bench_gpu.py" --seconds "$seconds" --out "$out"
  step "picture" 60 "$python" "$root/benchmarks/plot.py" "$out/gpu.csv"
fi
echo
printf '%s\n' "${summary[@]}" | tee -a "$out/log.txt"
exit $failed
