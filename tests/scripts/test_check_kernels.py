"""scripts/check_kernels.py without triton: what it compares is comparable, and a difference is noticed."""

import json
import sys
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.scripts import SCRIPTS

from linearize.recipe.resources import package_folder


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with PyTorch in the place of the kernels."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setitem(sys.modules, "triton_on_cpu", SimpleNamespace(load=lambda: None, tf32=nullcontext))
    monkeypatch.delitem(sys.modules, "check_kernels", raising=False)
    return import_module("check_kernels")


def test_every_operation_is_its_definition(checks: Any) -> None:
    for name, family, make_inputs in checks.operations():
        for check in ("fp32", "4:2 heads, 2 rows, odd widths, no state", "1 token"):
            how = checks.CHECKS[check]
            low = checks.cast(make_inputs(**how.sizes), how.dtype)
            run, definition = checks.FORMS[family]
            truth = checks.outcome(definition, checks.cast(low, torch.float64))
            worst, what = checks.error(checks.outcome(run, low), truth)
            assert worst <= how.limit, (name, check, what)
            assert any(name.startswith("d state") for name in truth) == ("state" in low)


def test_a_wrong_kernel_and_a_missing_one_do_not_hold(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    low = checks.cast(checks.inputs("additive", "head", T=9), torch.float32)
    right = checks.outcome(checks.additive.recurrent, low)

    def cell(run: Any) -> dict[str, Any]:
        return checks.compared("additive head", "fp32", run, lambda: right)

    def called(wrong: float) -> dict[str, torch.Tensor]:
        checks.fla_backend.kernel("m", "chunk_x")
        return {name: x + wrong for name, x in right.items()}

    monkeypatch.setattr(checks.fla_backend, "kernel", lambda module, name: None)
    assert cell(lambda: called(0.0))["holds"] and not cell(lambda: called(0.1))["holds"]
    assert not cell(lambda: called(float("nan")))["holds"]
    assert not cell(lambda: right)["holds"], "no kernel was called"
    assert "ZeroDivisionError" in cell(lambda: 1 / 0)["why"]


def test_the_committed_table_is_whole(checks: Any) -> None:
    made = json.loads((package_folder("eval") / "results" / "check-kernels.json").read_text())["cells"]
    assert {cell["operation"] for cell in made} == {name for name, *_ in checks.operations()} | set(checks.MIXERS)
    assert all(cell["holds"] for cell in made)
