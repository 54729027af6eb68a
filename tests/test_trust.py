"""No file of a stranger runs: nothing in the package unpickles, evaluates, or trusts code that comes with a model."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "linearize"
# What is not written -> where it is all the same, and why that reads no file of a stranger.
FORBIDDEN = {
    r"torch\.load\((?![^)]*weights_only=True)": {},
    r"\bimport pickle\b|\bpickle\.|from pickle\b|\bdill\b|\bjoblib\b|\bmarshal\b|\bshelve\b": {
        "evaluation/clock.py": "a task that this process hands to one that it has started, through a pipe"
    },
    r"(?<![\w.])(eval|exec)\(": {"checkpoint/remote_code.py": "the text of this package, in the file that it writes"},
    r"yaml\.(unsafe_|full_)?load\(|yaml\.(Unsafe|Full)?Loader\b": {},
    r"shell=True|os\.system\(|os\.popen\(": {},
    r"trust_remote_code=(?!False)(?!True`)": {},
}


def uses(pattern: str) -> set[str]:
    """Files of the package with code that a pattern matches."""
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    return {name for name, text in texts.items() if re.search(pattern, text)}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_runs_what_a_file_holds(pattern: str) -> None:
    assert uses(pattern) == set(FORBIDDEN[pattern])


def test_everything_that_opens_a_model_says_that_its_code_is_not_trusted() -> None:
    calls = r"Auto(?:Config|Tokenizer|ModelForCausalLM)\.from_(?:pretrained|config)\((?:[^()]|\([^()]*\))*\)"
    for path in (PACKAGE / "checkpoint").rglob("*.py"):
        for call in re.findall(calls, path.read_text(encoding="utf-8")):
            assert "trust_remote_code=False" in call, (path.name, call)
