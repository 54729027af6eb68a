#!/usr/bin/env bash
# The kernels on this machine's GPU: every recurrence and mixer against PyTorch, then their speed: eval/results/gpu-ops.json.
# The tests compile two configurations of each kernel. The speed needs all of them, about 2,000 (estimated at 17 to 35
# minutes on a cold machine, not measured); every cell is written as it is measured.
# Exit codes: 0 all holds, 1 something falls short, 2 there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
# Asked before anything is installed: without a GPU the kernels' package breaks some models of transformers.
nvidia-smi -L > /dev/null 2>&1 || {
  echo "There is no NVIDIA GPU here (nvidia-smi does not answer), so the kernels cannot be checked." >&2
  exit 2
}
. scripts/env.sh dev
python -m pytest -q tests/model/ops/test_kernels_gpu.py -k fla
exec python scripts/bench_ops.py --device cuda --name gpu-ops "$@"
