"""Committed results: what a script writes beside them says nothing of the machine but what `environment` tells."""

import argparse
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "results"


def test_settings_name_files_of_the_repository_by_their_place_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    begin = import_module("bench_common").begin
    given = argparse.Namespace(
        threads=1, seed=0, out=tmp_path, name="x", worker=False, recipe=ROOT / "recipes" / "a.yaml", other=tmp_path
    )
    results, _ = begin(given)
    assert results["settings"] == {"threads": 1, "seed": 0, "recipe": Path("recipes/a.yaml"), "other": tmp_path}


WRITTEN = sorted(file for kind in ("json*", "md", "html") for file in RESULTS.glob(f"*.{kind}"))


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_no_committed_result_names_a_checkout_or_a_temporary_folder(file: Path) -> None:
    named = rf"{re.escape(str(ROOT))}\b|/(?:work|home|root)/\w+|/tmp/tmp\w+"
    assert not re.findall(named, file.read_text(encoding="utf-8"))
