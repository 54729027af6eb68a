"""What tests of several files share about scripts."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc"
)


def runner(script: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What runs a script in this process, and what it would measure in others too.

    Called with options, it returns the results that the script wrote to a file in `out`.
    """
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module(script)
    if hasattr(module, "worker"):
        monkeypatch.setattr(module.common, "in_own_process", lambda script, **task: module.worker(**task))

    def run(*options: str | Path) -> dict[str, Any]:
        shared = ["--threads", "1", "--out", str(out), "--name", "tiny"]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options), *shared])
        module.main()
        return json.loads(next(out.glob("*tiny.json")).read_text())

    return run
