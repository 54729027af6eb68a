"""What an earlier comparison left is taken over only if it was of the same weights, and by one process."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import save_converted, save_source
from safetensors.torch import load_file, save_file

from linearize.checkpoint import atomic
from linearize.checkpoint.sources import Located, locate
from linearize.conversion.convert import convert
from linearize.errors import InputError
from linearize.evaluation.evaluate import bench, evaluate
from linearize.evaluation.processes import Processes
from linearize.evaluation.run import _source
from linearize.evaluation.saved import Saved
from linearize.evaluation.suite import Suite, TextSpec
from linearize.recipe.schema import Recipe, Source
from linearize.results.schema import SCHEMA


def settings(**source: Any) -> dict[str, Any]:
    return {"suite": {}, "seed": 0, "weights": "w", "source": {"id": "tiny", **source}}


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ({"weights": ["1"]}, {"weights": ["1"]}, True),
        ({"weights": ["1"]}, {"weights": ["2"]}, False),
        ({"weights": ["1"]}, {"weights": ["1", "2"]}, False),
        ({}, {"weights": ["2"]}, True),  # results of earlier versions do not say
        ({"id": "another"}, {"weights": ["2"]}, False),
    ],
)
def test_resume_takes_over_what_the_same_source_gave(tmp_path: Path, monkeypatch, before, now, same) -> None:
    target = tmp_path / "results.json"
    earlier = {"schema": SCHEMA, "settings": settings(**before), "columns": {}}
    target.write_text(json.dumps(earlier))
    monkeypatch.setattr("linearize.results.file.validate", lambda *_: None)
    if same:
        Saved(target, settings(**now), {}, True, Processes())
        return
    with pytest.raises(InputError, match=r"other settings \(source\)"):
        Saved(target, settings(**now), {}, True, Processes())


def other(folder: Path) -> None:
    file = folder / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_settings_tell_the_weights_of_the_source_and_of_what_adapters_belong_to(tmp_path: Path) -> None:
    source, base = save_source(tmp_path / "source", layers=2), save_converted(tmp_path / "base")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    known = [_source(locate(str(source)), [adapters])]
    for folder in (source, base):
        other(folder)
        known.append(_source(locate(str(source)), [adapters]))
    assert len({str(facts) for facts in known}) == 3
    assert len(known[0]["weights"]) == 2 and "path" not in known[0]
    hub = Located(id="org/name", path=source, revision="0" * 40)
    assert _source(hub, [base])["weights"] == [], "a commit says which weights"


@pytest.mark.parametrize("measure", [evaluate, bench])
def test_two_processes_do_not_write_one_file(tmp_path: Path, measure) -> None:
    out = tmp_path / "results.json"
    (tmp_path / ".results.json.partial").write_text("of the first")
    with atomic.locked(out), pytest.raises(InputError, match="another process"):
        measure(tmp_path / "model", out=out)
    assert (tmp_path / ".results.json.partial").read_text() == "of the first"


@pytest.mark.parametrize(("before", "same"), [("a", True), ("b", False), (None, True)])
def test_resume_takes_over_what_the_same_tokenizer_gave(tmp_path: Path, monkeypatch, before, same) -> None:
    target = tmp_path / "results.json"
    said = {} if before is None else {"tokenizer": before}  # results of earlier versions do not say
    target.write_text(json.dumps({"schema": SCHEMA, "settings": settings() | said, "columns": {}}))
    monkeypatch.setattr("linearize.results.file.validate", lambda *_: None)
    if same:
        Saved(target, settings() | {"tokenizer": "a"}, {}, True, Processes())
        return
    with pytest.raises(InputError, match=r"other settings \(tokenizer\).*run`: pass --overwrite"):
        Saved(target, settings() | {"tokenizer": "a"}, {}, True, Processes())


@pytest.mark.parametrize("columns", [["source"], ["window"], ["student"]])
def test_a_source_with_other_weights_is_refused_where_it_is_read(tmp_path: Path, monkeypatch, columns) -> None:
    monkeypatch.chdir(tmp_path)
    source, student = save_source(tmp_path / "source", layers=2), tmp_path / "student"
    convert(locate(str(source)), Recipe(source=Source(id=str(source))), student)
    other(source)
    suite = Suite(name="mine", perplexity=[TextSpec(text="wikitext2_valid", length=32, blocks=1)])
    if columns == ["student"]:
        evaluate(student, suite, columns=columns, progress=False)
        return
    with pytest.raises(InputError, match="was converted from other weights.*--source"):
        evaluate(student, suite, columns=columns, progress=False)
    evaluate(student, suite, columns=columns, source=str(source), progress=False)
