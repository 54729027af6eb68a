#!/usr/bin/env bash
# The product in one command: converts SmolLM2-135M, recovers it for a few minutes on the CPU, compares it with its source.
# Stages that are finished are kept, so after an interruption the same command goes on.
set -euo pipefail
. "$(dirname "$0")/env.sh"
linearize run smollm2-135m --out runs/demo "$@"
echo
echo "The comparison is in runs/demo/results.json and report.html, the model in runs/demo/merged. It answers:"
linearize generate runs/demo/merged --prompt "Name three things that live in a river." --max-new-tokens 60 --temperature 0
