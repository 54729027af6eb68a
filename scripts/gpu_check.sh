#!/usr/bin/env bash
# Parity and speed of every recurrence and mixer on this machine's GPU, in less than 10 minutes: eval/results/gpu-ops.json.
# Exit codes: 0 all holds, 1 something falls short or was not reached in time, 2 there is no GPU or no kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
# Asked before anything is installed: without a GPU the kernels' package breaks some models of transformers.
nvidia-smi -L > /dev/null 2>&1 || {
  echo "There is no NVIDIA GPU here (nvidia-smi does not answer), so the kernels cannot be checked." >&2
  exit 2
}
. scripts/env.sh cuda
exec python scripts/gpu_check.py "$@"
