"""results.json: what is read, refused and written, and the table, checked by hand."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NotRequired, get_args, get_origin, get_type_hints

import pytest
from helpers.fake_results import full
from typing_extensions import is_typeddict

from linearize.errors import InputError
from linearize.recipe.resources import package_folder
from linearize.results import file as results_file
from linearize.results.schema import Results
from linearize.results.table import lay_out, markdown_table


def score(value: float, items: list[float] | None = None, **changes) -> dict:
    return {
        "label": "ARC-e",
        "metric": "acc",
        "value": value,
        "stderr": 0.05,
        "n": 100,
        "higher_is_better": True,
        "chance": 0.25,
        "items": items,
        **changes,
    }


def column(value: float, ppl: float) -> dict:
    position = [
        {"start": 1, "end": 64, "ppl": ppl, "tokens": 63},
        {"start": 64, "end": 128, "ppl": 2 * ppl, "tokens": 64},
    ]
    text = {"text": "wiki", "length": 128, "blocks": 1, "value": ppl, "tokens": 127, "by_position": position}
    return {
        "tasks": {
            "arc": score(value),
            "lambada": score(12.0, label="LAMBADA", metric="perplexity", higher_is_better=False),
        },
        "perplexity": {"value": ppl, "tokens": 127, "by_position": position, "texts": [text]},
        "seconds": 1.0,
    }


@pytest.fixture
def content() -> dict:
    return {
        "schema": 1,
        "complete": True,
        "model": "runs/demo/merged",
        "source": "org/name",
        "suite": "smoke",
        "columns": {"source": column(0.6, 20.0), "student": column(0.5, 23456.0)},
        "summary": {
            "average": {
                "source": {"value": 0.6, "stderr": 0.02, "tasks": 2},
                "student": {"value": 0.5, "stderr": None, "tasks": 2},
            },
            "recovery": {"student": {"raw": 0.8333, "chance_corrected": None}},
            "memory": {"with": 30.0, "without": 33.0, "loss": 0.0953102, "low": 0.02, "high": 0.2, "start": 64},
            "paired": {"source": {"tasks": {}, "average": {"difference": -0.1, "low": -0.2, "high": 0.01}}},
        },
        "environment": {},
    }


def test_what_is_written_is_read_back_and_lists_of_numbers_take_one_line(content: dict, tmp_path: Path) -> None:
    content["columns"]["student"]["tasks"]["arc"]["items"] = [1.0, 0.0, -2.5e-07]
    content["model"] = "odd [1,\n2] [1,   2] name"  # looks like a list in the file, and must come back as it was
    path = results_file.write(content, tmp_path / "new" / "results.json")
    assert results_file.read(path) == content
    assert '"items": [1.0, 0.0, -2.5e-07]' in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_refused_file_leaves_the_old_one(content: dict, tmp_path: Path) -> None:
    path = results_file.write(content, tmp_path / "results.json")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"columns\.student\.seconds: missing"):
        broken = copy.deepcopy(content)
        del broken["columns"]["student"]["seconds"]
        results_file.write(broken, path)
    with pytest.raises(InputError, match="found nan; input should be a finite number"):
        results_file.write(content | {"columns": content["columns"] | {"student": column(float("nan"), 1.0)}}, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_every_problem_is_named_at_once(content: dict) -> None:
    student = content["columns"]["student"]
    del content["suite"]
    content["columns"]["studnet"] = student
    student["tasks"]["arc"] |= {"value": True, "n": "many", "stderr": None}
    student["perplexity"]["tokens"] = 1.5
    with pytest.raises(InputError) as error:
        results_file.validate(content, "here")
    for problem in (
        "here: does not follow schema 1: suite: missing",
        "columns.studnet: unknown column",
        "arc.value: found True",
        "arc.n: found 'many'",
        "perplexity.tokens: found 1.5",
    ):
        assert problem in str(error.value)
    assert "stderr" not in str(error.value)


def places(value: object, schema: object, at: tuple = ()) -> Iterator[tuple[tuple, bool]]:
    """Every key of results that the schema names, the first entry for all of a list or mapping, and whether the schema
    can do without it."""
    while get_origin(schema) in (Annotated, NotRequired, UnionType):
        schema = get_args(schema)[0]
    if is_typeddict(schema) and isinstance(value, dict):
        for key, kind in get_type_hints(schema, include_extras=True).items():
            if key in value:
                yield (*at, key), key in schema.__optional_keys__
                yield from places(value[key], kind, (*at, key))
    elif get_origin(schema) in (list, dict) and value:
        key, inner = next(iter(value.items())) if isinstance(value, dict) else (0, value[0])
        yield from places(inner, get_args(schema)[-1], (*at, key))


def changed(content: dict, at: tuple, change: Callable[[Any, Any], None]) -> dict:
    content = copy.deepcopy(content)
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    change(inner, at[-1])
    return content


def test_a_key_that_is_missing_or_of_another_kind_is_named() -> None:
    content, optional = full(), []
    for at, without in places(content, Results):
        if at == ("schema",):
            continue
        where = ".".join(map(str, at))
        for change, message in (
            (lambda inner, key: inner.pop(key), "missing"),
            (lambda inner, key: inner.update({key: {1}}), "found {1}; input should be"),
        ):
            if without and message == "missing":
                optional.append(at)
                continue
            with pytest.raises(InputError, match=re.escape(f"{where}: {message}")):
                results_file.validate(changed(content, at, change))
    assert {at[-1] for at in optional} >= {"label", "items", "losses", "speed", "recall", "behaviour"}
    for at in optional:
        fewer = changed(content, at, lambda inner, key: inner.pop(key))
        results_file.validate(fewer)
        assert lay_out(fewer).rows and markdown_table(fewer)


def test_a_summary_of_a_column_that_is_not_there(content: dict) -> None:
    del content["columns"]["source"]
    with pytest.raises(InputError, match=r"summary\.paired\.source: there is no such column; columns: student"):
        results_file.validate(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; write it with"),
        ("{", "no readable JSON"),
        ("[]", "no results file"),
        ('{"schema": 2}', "schema is 2; this version reads 1"),
        ('{"schema": 1, "columns": []}', "columns: found \\[\\]; input should be"),
        ('{"schema": 1, "columns": {"student": 1}}', "columns.student: found 1; input should be"),
    ],
)
def test_unreadable_files(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=message):
        results_file.read(tmp_path / "r.json")


def test_a_place_that_cannot_be_written(content: dict, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        results_file.write(content, tmp_path / "file" / "results.json")


def test_the_table_by_hand(content: dict) -> None:
    table = lay_out(content)
    assert table.header == ["", "source", "student"]
    assert table.rows == [
        ["ARC-e (acc)", "60.0 ± 5.0", "50.0 ± 5.0"],
        ["LAMBADA (perplexity)", "12.00 ± 0.05", "12.00 ± 0.05"],
        ["average", "60.0 ± 2.0", "50.0"],
        ["kept of the source", "", "83.3 %"],
        ["perplexity", "20.00", "2.35e+04"],
        ["… at 1–63", "20.00", "2.35e+04"],
        ["… at 64–127", "40.00", "4.69e+04"],
    ]
    text, memory, paired = table.notes
    assert "wiki, 1 × 128 tokens" in text
    # exp(-0.0953102) - 1 = -9.09 %; the interval turns round with the sign
    assert "-9.1 % perplexity beyond the window (33.00 → 30.00; 95 % interval -18.1 to -2.0 %)" in memory
    assert paired == "student − source, same items, 95 % interval: -10.0 (-20.0 to +1.0) points on the tasks' average"


def test_markdown_holds_the_same_cells_and_only_the_chosen_columns(content: dict) -> None:
    lines = markdown_table(content).splitlines()
    assert lines[:3] == [
        "|  | source | student |",
        "| --- | ---: | ---: |",
        "| ARC-e (acc) | 60.0 ± 5.0 | 50.0 ± 5.0 |",
    ]
    assert lines[-1].startswith("- student − source")
    alone = markdown_table(content, columns=["student"])
    assert "| ARC-e (acc) | 50.0 ± 5.0 |" in alone and "student − source" not in alone


def test_columns_without_common_parts(content: dict) -> None:
    del content["columns"]["source"]["perplexity"], content["summary"]
    content["columns"]["student"]["tasks"] = {"other": score(0.4, label="Other")}
    rows = {row[0]: row[1:] for row in lay_out(content).rows}
    assert rows["ARC-e (acc)"] == ["60.0 ± 5.0", ""] and rows["Other (acc)"] == ["", "40.0 ± 5.0"]
    assert rows["perplexity"] == ["", "2.35e+04"]
    for entry in content["columns"].values():
        entry.pop("perplexity", None)
    assert "perplexity" not in {row[0] for row in lay_out(content).rows}


def test_the_file_is_plain_json(content: dict, tmp_path: Path) -> None:
    assert json.loads(results_file.write(content, tmp_path / "r.json").read_text(encoding="utf-8")) == content


def test_committed_results_follow_the_schema() -> None:
    found = {file: json.loads(file.read_text()) for file in (package_folder("eval") / "results").glob("*.json")}
    comparisons = [file for file, content in found.items() if {"suite", "columns"} <= content.keys()]
    assert len(comparisons) >= 5 and all(results_file.read(file) for file in comparisons)
