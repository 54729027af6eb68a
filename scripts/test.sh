#!/usr/bin/env bash
# Runs the test suite with coverage, or with arguments only what they name:  bash scripts/test.sh tests/test_recipes.py -x
set -euo pipefail
. "$(dirname "$0")/env.sh" dev
if [ $# -gt 0 ]; then
  exec pytest "$@"
fi
# One process per core; a file stays together, because its tests share models, and files keep the order of conftest.py.
exec pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --cov --cov-fail-under=90 --durations=10
