#!/usr/bin/env bash
# Its slices ran on an H100 one by one; as a whole it ran on a CPU, from an environment that held torch alone (--tiny).
# Everything there is to know from a GPU, on a machine without network: kernels, speed by length, a training step, and
# SmolLM2-135M on 20 M tokens by three recipes with its evaluation. In slices, each of which writes what it has found to
# eval/results/gpu-*: the same command again goes on where the last one stopped, until it says that all is done.
#   bash scripts/gpu_all.sh [PARTS] [--minutes 9] [--tiny] [--table] [--only SLICE...]
# PARTS is a folder with parts that scripts/gpu_pack.sh made; they may come one by one, in several calls. What is kept
# from call to call lies in $LINEARIZE_GPU (~/.cache/linearize-gpu). --table computes how long it takes on an H100.
# Exit codes: 0 all is done, 3 there is more to do, 1 a slice failed.
set -euo pipefail
store=${LINEARIZE_GPU:-$HOME/.cache/linearize-gpu}
mkdir -p "$store/parts"
if [ -n "${1:-}" ] && [ -d "$1" ]; then
  for file in "$1"/part-* "$1/parts.sha256"; do
    if [ -e "$file" ]; then cp -u "$file" "$store/parts/"; fi
  done
  shift
fi
cd "$(dirname "$0")/.."
if [ ! -e "$store/unpacked" ] && [ -e "$store/parts/parts.sha256" ]; then
  if ! (cd "$store/parts" && sha256sum --check --quiet parts.sha256 2>/dev/null); then
    echo "Of $(wc -l < "$store/parts/parts.sha256") parts $(ls "$store/parts" | grep -c '^part-') are here, or one is damaged; bring the others." >&2
    exit 3
  fi
  mkdir -p "$store/pack"
  cat "$store"/parts/part-* | tar -C "$store/pack" -xf -
  python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
    --target "$store/site" "$store"/pack/wheels/*.whl
  tar -C "$store/site" -xf "$store/pack/triton.tar.xz"
  touch "$store/unpacked"
fi
export PYTHONPATH="$PWD:$store/site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 LINEARIZE_GPU="$store"
exec python3 scripts/gpu_slices.py "$@"
