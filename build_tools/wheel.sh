#!/usr/bin/env bash
# Builds the wheel of the Python in BIN, tags it by what auditwheel finds in it, and has twine look at it.
#   BIN=.venv/bin build_tools/wheel.sh SOURCES DESTINATION
# torch's libraries are torch's: accumloss imports torch before its own module, whose versions need not agree.
set -euo pipefail
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT
"$BIN/python" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$raw" "$1"
mkdir -p "$2"
PATH=$BIN:$PATH "$BIN/auditwheel" repair --exclude 'libtorch*.so' --wheel-dir "$2" "$raw"/*.whl
"$BIN/twine" check --strict "$2"/*.whl
