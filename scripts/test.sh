#!/usr/bin/env bash
# Runs the tests: those that take minutes left out, or with --all every one, or what the arguments name.
#   bash scripts/test.sh        bash scripts/test.sh --all        bash scripts/test.sh tests/recipe -x
set -euo pipefail
. "$(dirname "$0")/env.sh" dev
# One process per core; a file stays together, because its tests share models, and files keep the order of conftest.py.
parallel=(--numprocesses auto --dist loadfile --no-loadscope-reorder --durations=10)
case "${1:-}" in
  "") exec pytest "${parallel[@]}" -m "not slow" ;;
  --all)
    # Coverage is that of the quick tests alone: counting lines makes the slow ones half as slow again.
    pytest "${parallel[@]}" -m "not slow" --cov --cov-fail-under=90
    exec pytest "${parallel[@]}" -m slow
    ;;
  *) exec pytest "$@" ;;
esac
