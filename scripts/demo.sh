#!/usr/bin/env bash
# The product in one command: converts SmolLM2-135M, recovers it for a few minutes on the CPU, and compares it with its source,
# and with a linear recurrence (gla) as memory in the place of clusters.
# What is finished is kept, so after an interruption the same command goes on.
set -euo pipefail
. "$(dirname "$0")/env.sh"
linearize run smollm2-135m-best --set train.distil.tokens=16384 --set train.distil.seq_len=1024 --out runs/demo "$@"
[ -e runs/demo/gla ] || linearize convert --model smollm2-135m --out runs/demo/gla
[ -e runs/demo/gla-calibrated ] || linearize calibrate runs/demo/gla --out runs/demo/gla-calibrated
linearize eval runs/demo/merged --against runs/demo/gla-calibrated --out runs/demo/results.json --resume
echo
echo "The comparison is in runs/demo/results.json and report.html, the model in runs/demo/merged. It answers:"
linearize generate runs/demo/merged --prompt "Name three things that live in a river." --max-new-tokens 60 --temperature 0
