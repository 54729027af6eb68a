#!/usr/bin/env bash
# linearize's calls of flash-linear-attention on fla's own Triton kernels, without a GPU: eval/results/check-kernels.md.
#   bash scripts/check_kernels.sh        bash scripts/check_kernels.sh --only delta --out /tmp
#   bash scripts/check_kernels.sh --compile    our own kernels, compiled for GPUs: check-kernels-compiled.md
# Takes about ten minutes. Triton goes into an environment of its own, once (286 MB, 1 GB on disk, two minutes): beside it
# some models of transformers break on a machine without a GPU. Exit codes: 0 all holds, 1 something does not.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || . scripts/env.sh dev
packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
venv=${XDG_CACHE_HOME:-$HOME/.cache}/linearize/triton-3.9.0
if [ ! -e "$venv/ready" ]; then
  python -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0
  touch "$venv/ready"
fi
# All else is taken from the environment of the tests, as its versions are.
echo "$packages" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth"
script=check_kernels
if [ "${1:-}" = --compile ]; then script=compile_kernels && shift; fi
PYTHONPATH=$PWD exec "$venv/bin/python" -W ignore "scripts/$script.py" "$@"
