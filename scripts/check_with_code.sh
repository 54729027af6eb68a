#!/usr/bin/env bash
# Opens a folder written with --with-code in a fresh environment that has PyTorch and transformers and not this package.
#   bash scripts/check_with_code.sh runs/demo/0-converted
set -euo pipefail
folder=$(realpath "$1")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" torch transformers
cd "$scratch"
HF_MODULES_CACHE="$scratch/modules" "$scratch/venv/bin/python" - "$folder" <<'PYTHON'
import importlib.util
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

assert importlib.util.find_spec("linearize") is None
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = tokenizer("The river rose in the night, and", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
PYTHON
