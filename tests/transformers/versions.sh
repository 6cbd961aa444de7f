#!/usr/bin/env bash
# Runs tests/transformers against other versions of transformers, each in a venv of its own, and prints a line for each.
#   tests/transformers/versions.sh [VERSION ...]        default: 4.57.6 5.0.0 5.10.2
# torch is that of the Python that runs this (PYTHON, default .venv/bin/python), where accumloss is installed too.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
WHERE=${WHERE:-build/versions}
here=$("$PYTHON" -c 'import site; print(site.getsitepackages()[0])')
failed=0
for version in "${@:-4.57.6 5.0.0 5.10.2}"; do
  for v in $version; do
    venv=$WHERE/$v
    [ -d "$venv" ] || "$PYTHON" -m venv "$venv"
    site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    echo "import site; site.addsitedir('$here')" > "$site/base.pth"  # torch, accumloss and pytest come from there; what is installed here goes before
    "$venv/bin/python" -m pip install -q --disable-pip-version-check "transformers==$v" "accelerate" "peft" || { failed=1; continue; }
    result=$("$venv/bin/python" -m pytest -q -p no:cacheprovider --durations=0 tests/transformers 2>&1 | tee "$WHERE/$v.log" | tail -n 1)
    echo "transformers $v: $result"
    case "$result" in *failed*|*error*) failed=1 ;; esac
  done
done
exit $failed
