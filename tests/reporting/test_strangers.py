"""Results of strangers: their text is shown as it stands everywhere, and no value of theirs ends in a traceback."""

import io
import json
from html import escape
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_results import full
from huggingface_hub import ModelCard
from rich.console import Console

from linearize.errors import InputError
from linearize.formats import each_string
from linearize.hub.card import write_card
from linearize.reporting import page, terminal
from linearize.results import file as results_file
from linearize.results.table import markdown_table

NAMES = [
    "[red]a[/red] [/b]",
    "[link=https://evil]x",
    "\x1b[2J\x1b]0;t\x07",
    "a\u202egnp.exe",
    "half \ud800",
    "a | b\n| c | d |",
    "<script>alert(1)</script>",
    "`x` **y** [z](http://e)",
    "$\\frac{1}$ :smile:",
    "---\nlicense: mit",
]


def named(name: str) -> dict[str, Any]:
    """Results in which everything that has a free name has this one."""
    results = each_string(full(), lambda text: name if text == "embedded_piqa" else text)
    results |= {"model": name, "source": name, "suite": name}
    for column in results["columns"].values():
        column["tasks"][name] |= {"label": name, "metric": name}
        for text in column["perplexity"]["texts"]:
            text["text"] = name
    results["environment"] |= {"cpu": name, "device": name}
    return results


def read(results: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "results.json").write_text(json.dumps(results))
    return results_file.read(tmp_path / "results.json")


@pytest.mark.parametrize("name", NAMES)
def test_names_on_the_terminal_and_in_markdown(name: str, tmp_path: Path) -> None:
    results = read(named(name), tmp_path)
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system=None)
    terminal.show(results, console)
    terminal.show_speed(results | {"settings": results["settings"]}, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for raw in ("\x1b[2J", "\x1b]", "\u202e", "\ud800", "\n| c"):
        assert raw not in shown
    if name.isascii() and name.isprintable():
        assert name in shown, "the same text, not what markup makes of it"
    lines = markdown_table(results).splitlines()
    widths = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert widths == {len(results["columns"]) + 2}, "no cell more"
    assert "<script" not in "\n".join(lines) and "[z](" not in "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_page(name: str, tmp_path: Path) -> None:
    written = page.write([read(named(name), tmp_path)], tmp_path / "r.html").read_text(encoding="utf-8")
    for raw in ("<script", "\x1b", "\u202e", "[link=https://evil]x</a>"):
        assert raw not in written
    if "\n" not in name and name.isprintable():
        assert escape(name) in written


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_card(name: str, converted: Path, tmp_path: Path) -> None:
    """Front matter is YAML with the values that are given, and the recipe stays inside its fence."""
    config = json.loads((converted / "config.json").read_text())
    config["linearize"]["source"] = {"id": name, "model_type": "llama"}
    recipe = f"description: |\n  ```\n  # {name}\n  ````\n"
    card = write_card(converted, config, None, "org/name", read(named(name), tmp_path), recipe)
    metadata, body = ModelCard(card).data.to_dict(), ModelCard(card).text
    assert [each["name"] for each in metadata["model-index"]] == ["name"] and "license" not in metadata
    assert "\n`````yaml\n" in body and body.count("\n`````\n") == 1
    outside = body.partition("\n`````yaml")[0] + body.partition("\n`````\n")[2]
    assert "<script" not in outside and "\x1b" not in card and "\nlicense: mit" not in outside


WRONG = [
    (("columns", "source", "perplexity", "value"), 0, "value: found 0"),
    (("columns", "source", "perplexity", "by_position", 0, "ppl"), 0.0, "greater than 0"),
    (("columns", "source", "perplexity", "value"), float("nan"), "expected finite numbers"),
    (("columns", "student", "seconds"), float("inf"), "expected finite numbers"),
    (("columns", "student", "seconds"), 10**400, "expected finite numbers"),
    (("columns", "student", "tasks"), [], "valid dictionary"),
    (("columns", "student", "behaviour", "agreement", "lengths"), [10**12], "less than or equal"),
    (("columns", "student", "speed", 0, "context"), 0, "greater than 0"),
    (("settings", "suite"), 5, "suite: found 5"),
    (("environment",), None, "environment: found None"),
    (("model",), 5, "model: found 5"),
    (("schema",), ["x" * 10**5] * 9, "this version reads 1"),
    (("summary", "memory"), {**dict.fromkeys(("with", "without", "high"), 1.0), "loss": -1e5, "low": -1e5, "start": 1},
     "do not go together"),
    (("environment", "versions"), [1], "do not go together"),
]  # fmt: skip


@pytest.mark.parametrize(("where", "value", "expected"), WRONG, ids=lambda value: str(value)[:40])
def test_values_that_cannot_be_shown(where: tuple, value: Any, expected: str, tmp_path: Path) -> None:
    results = full()
    inner: Any = results
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(InputError) as error:
        page.render([read(results, tmp_path)] * 2)
    assert expected in str(error.value) and len(str(error.value)) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize("content", ["[" * 100_000, "", "\x00", "[]", '{"schema": 1}', '{"schema": 1e999}', "9" * 9999])
def test_files_that_are_no_results(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    for path in (tmp_path / "r.json", tmp_path):
        with pytest.raises(InputError):
            results_file.read(path)
