"""The page: every number and every chart is there, nothing is loaded from elsewhere, and a browser draws it."""

import copy
import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import browsers
from helpers.fake_results import full

from linearize.errors import InputError
from linearize.reporting import charts, page, verdict
from linearize.results import file as results_file
from linearize.results import summary as statistics
from linearize.results.schema import Score
from linearize.results.table import lay_out

VOID = {"meta", "link", "br"}
LOADING = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background"}
SECTIONS = [
    "What it keeps of the source",
    "All numbers",
    "Paired differences",
    "Recall",
    "Pairs remembered",
    "Behaviour",
    "Speed and memory by context",
    "Layers",
    "Settings, machine, versions, data",
]


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order.

    Attributes:
        tables: rows of cells of each table.
        figures: label of the chart of each figure.
        loads: values of all attributes that could load something.
        ids, styles, headings, text: what their names say.
    """

    def __init__(self, content: str):
        super().__init__()
        self.stack: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.figures: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.styles: list[str] = []
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(content)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.loads += [value for name, value in values.items() if name in LOADING]
        self.ids += [values["id"]] if "id" in values else []
        self.styles += [value for name, value in values.items() if name in ("style", "clip-path", "fill")]
        if tag == "svg" and self.stack[-1] == "figure":
            assert values["role"] == "img"
            self.figures.append(values["aria-label"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "style":
            self.styles.append(data)
            return
        self.text += data
        if {"td", "th"} & set(self.stack):
            self.tables[-1][-1][-1] += data
        if self.stack and self.stack[-1] == "h2":
            self.headings[-1] += data


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found = full()
    results_file.validate(found)
    return found


@pytest.fixture(scope="module")
def html(results: dict[str, Any]) -> str:
    return page.render([results])


@pytest.fixture(scope="module")
def read(html: str) -> Page:
    return Page(html)


@pytest.fixture
def small(results: dict[str, Any]) -> dict[str, Any]:
    """Without what takes long to draw."""
    found = copy.deepcopy(results)
    for column in found["columns"].values():
        for section in ("recall", "capacity", "behaviour", "speed"):
            column.pop(section, None)
    return found


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts without a picture: for tests of the words and tables around them."""
    monkeypatch.setattr(
        charts, "svg", lambda plot, label, height=3.0: f'<svg role="img" aria-label="{escape(label)}"/>'
    )


# --- what is on it ----------------------------------------------------------------------------------------------------


def test_what_pruning_cost_is_on_the_page(small: dict[str, Any], undrawn: None) -> None:
    pruning = {"sparsity": "2:4", "zeros": 0.5, "loss_before": 3.1, "loss_after": 3.6}
    results_file.validate(small | {"pruning": pruning})
    words = "Pruned to 2:4: 50.0 % of the weights of its linear layers are zero."
    assert f"{words} The loss of text that was held back went from 3.100 to 3.600" in page.render(
        [small | {"pruning": pruning}]
    )
    assert "Pruned" not in page.render([small])


def test_every_number_of_the_table_is_on_the_page(results: dict[str, Any], read: Page) -> None:
    table = lay_out({**results, "summary": {**results["summary"], "paired": {}}})
    rows = [row for rows in read.tables for row in rows]
    for row in table.rows:
        assert row in rows
    for note in table.notes:
        assert note in read.text
    mmlu = next(row for row in table.rows if row[0].startswith("MMLU"))
    assert [rows for rows in read.tables if mmlu in rows] == [[table.header, mmlu]], "MMLU stands apart"


def test_paired_differences_are_on_the_page(results: dict[str, Any], read: Page) -> None:
    (table,) = (rows for rows in read.tables if rows[0][0] == "student minus")
    cells = {(row[0], control): cell for row in table for control, cell in zip(table[0][1:], row[1:], strict=True)}
    for control, pair in results["summary"]["paired"].items():
        entries = {"average, points": (pair["average"], 100, 1), "loss, nats per token": (pair["loss"], 1, 4)}
        for task, entry in pair["tasks"].items():
            entries[f"{results['columns']['student']['tasks'][task]['label']}, points"] = (entry, 100, 1)
        for label, (entry, scale, digits) in entries.items():
            shown = [f"{scale * entry[key]:+.{digits}f}" for key in ("difference", "low", "high")]
            assert cells[label, control] == f"{shown[0]}{shown[1]} to {shown[2]}"


def test_the_other_sections_hold_their_numbers(results: dict[str, Any], read: Page) -> None:
    rows = [row for rows in read.tables for row in rows]
    for name, column in results["columns"].items():
        for entry in column.get("speed", ()):
            start = [name, str(entry["context"]), str(entry["batch"]), f"{entry['prefill_seconds']:.3g}"]
            assert [*start, f"{1000 * entry['token_seconds']:.2f}"] in [row[:5] for row in rows]
        if "recall" in column:
            mean = 100 * sum(entry["value"] for entry in column["recall"]) / len(column["recall"])
            within = [
                entry["value"] for entry in column["recall"] if entry["multiple"] * (1 - (entry["depth"] or 0)) > 1
            ]
            told = [name, f"{mean:.1f}", f"{100 * sum(within) / len(within):.1f}"]
            assert told in [[row[0], row[-2], row[-1].split(" ± ")[0]] for row in rows]
            for entry in column["recall"]:
                task = f"Recall of {name} in {entry['task']}."
                (label,) = (label for label in read.figures if label.startswith(task))
                assert f"{100 * entry['value']:.0f} % at {entry['length']} tokens" in label
    behaviour = [column["behaviour"] for column in results["columns"].values()]
    assert ["greedy tokens equal, mean", *(f"{entry['agreement']['mean']:.1f}" for entry in behaviour)] in rows
    assert ["steps equal with and without cache", *(f"{e['cached']['equal']} of 400" for e in behaviour)] in rows
    for value in results["environment"]["data"].values():
        assert value in read.text


def test_every_figure_is_there_in_order(results: dict[str, Any], read: Page) -> None:
    assert read.headings == SECTIONS
    expected = ["Perplexity by the number of tokens", "Share of the source's score", "Differences of student"]
    expected += [
        f"Recall of {n} in {t}" for t in ("needle", "associative") for n in ("student", "student/window", "source")
    ]
    expected += ["Pairs remembered, by the number of pairs", "Most pairs remembered, by the cache"]
    expected += ["KL to the source", "Share of prompts still equal", "Norm of the memory", "Effective rank"]
    expected += [f"{t}, {n}" for n in ("1 row", "8 rows") for t in ("Time per decoded token", "Peak memory", "Cache")]
    expected += ["Layers of student"]
    assert len(read.figures) == len(expected)
    for label, start in zip(read.figures, expected, strict=True):
        assert all(part in label for part in start.split(", ")), (label, start)
    points = results["columns"]["student"]["perplexity"]["by_position"]
    label = next(label for label in read.figures if label.startswith("Perplexity"))
    assert all(f"{bucket['ppl']:.4g} at" in label for bucket in points)


def test_what_could_not_be_measured_leaves_its_figure_out(results: dict[str, Any], tmp_path: Path) -> None:
    """A state of one vector per head has a norm and no rank; optional keys may all be missing."""
    fewer = copy.deepcopy(results)
    for column in fewer["columns"].values():
        for row in column["behaviour"]["state"] or ():
            row["effective_rank"] = None
        column.pop("recall", None)
        column.pop("capacity", None)
        for score in column["tasks"].values():
            for key in Score.__optional_keys__ & score.keys():
                del score[key]
    del fewer["settings"], fewer["layers"]
    results_file.validate(fewer)
    figures = [label.split(",")[0] for label in Page(page.write([fewer], tmp_path / "r.html").read_text()).figures]
    assert "Norm of the memory's state" in figures and "Effective rank of the state" not in figures
    assert not any(label.startswith(("Recall", "Layers")) for label in figures)


def test_an_interrupted_comparison_is_refused(results: dict[str, Any], tmp_path: Path) -> None:
    partial = {key: value for key, value in results.items() if key != "summary"}
    with pytest.raises(InputError, match="interrupted; finish it with `linearize eval --resume`"):
        page.write([partial], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_bars_are_shares_of_the_source_with_the_interval_of_the_paired_difference() -> None:
    common = {"chance": 0.25, "stderr": 0.1}
    source = {"tasks": {"a": {**common, "value": 0.5, "items": [1.0, 1.0, 0.0, 0.0]}, "b": {**common, "value": 0.0}}}
    column = {"tasks": {"a": {**common, "value": 0.25, "items": [1.0, 0.0, 0.0, 0.0]}, "b": {**common, "value": 0.1}}}
    # Differences 0, -1, 0, 0: standard deviation 0.5, so standard error 0.25.
    assert charts.shares(column, source) == {"a": (0.5, pytest.approx(1.96 * 0.25 / 0.5))}
    column["tasks"]["a"]["items"] = None
    assert charts.shares(column, source) == {"a": (0.5, pytest.approx(1.96 * 0.1 / 0.5))}


def test_what_was_not_measured_is_left_out(small: dict[str, Any], undrawn: None) -> None:
    del small["layers"]
    found = Page(page.render([small]))
    assert found.headings == [
        name for name in SECTIONS if not name.startswith(("Recall", "Pairs", "Behaviour", "Layers", "Speed"))
    ]
    small["columns"] = {
        "student": {"tasks": {}, "seconds": 1.0, "perplexity": small["columns"]["student"]["perplexity"]}
    }
    small["summary"] = statistics.summarize(small["columns"], 64)
    found = Page(page.render([small]))
    assert found.headings == ["All numbers", "Settings, machine, versions, data"]
    assert "Cannot be told yet" in found.text


def test_what_could_not_be_measured_says_why(small: dict[str, Any], undrawn: None) -> None:
    common = {"task": "needle", "multiple": 64, "depth": None, "value": None, "stderr": None, "n": 0, "items": []}
    asked = {**common, "multiple": 1, "length": 64, "depth": 0.5, "value": 0.25, "n": 4}
    small["columns"]["student"]["recall"] = [asked, {**common, "length": 4096, "skipped": "the context is 2048"}]
    small["columns"]["student"]["speed_left_out"] = [{"context": 9, "batch": 2, "reason": "no memory"}]
    small["columns"]["student"]["speed"] = []
    found = Page(page.render([small]))
    assert "Not asked: needle at 4096 tokens: the context is 2048." in found.text
    assert verdict.METRICS["recall"].of(small) == 0.25


# --- how it is made ---------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere(html: str, read: Page) -> None:
    assert all(value.startswith("#") or value == "data:," for value in read.loads), read.loads
    assert not {"script", "img", "image", "iframe", "object", "embed", "base"} & read.tags
    for style in read.styles:
        assert "@import" not in style and all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", style))
    assert len(read.ids) == len(set(read.ids))
    assert {value[1:] for value in read.loads if value.startswith("#")} <= set(read.ids)
    assert {target[1:] for style in read.styles for target in re.findall(r"url\(([^)]*)", style)} <= set(read.ids)
    assert not re.findall(r"https?://", html)


def test_the_same_numbers_give_the_same_picture() -> None:
    def draw() -> str:
        return charts.survival({"student": [1, 2, 5]}, 6, {"student": ("#123456", "--")}, "a & b")

    assert draw() == draw() and 'aria-label="a &amp; b"' in draw()


NASTY = "</title><script>alert('$x_{1$')</script> & \"名\" _y"


def test_names_are_text_and_nothing_else(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small["model"] = small["source"] = small["suite"] = NASTY
    small["environment"]["cpu"] = NASTY
    small["environment"]["data"] = {NASTY: NASTY}
    small["layers"][0]["mixer"] = NASTY
    for column in small["columns"].values():
        for text in column["perplexity"]["texts"]:
            text["text"] = NASTY
        for score in column["tasks"].values():
            score["label"] = score["metric"] = NASTY
        column["tasks"]["mmlu " + NASTY] = column["tasks"]["mmlu"]
        column["recall"] = [{**full()["columns"]["student"]["recall"][0], "task": NASTY}]
    for reports in ([small], [small, copy.deepcopy(small)]):
        found = Page(page.render(reports))
        assert "script" not in found.tags and found.text.count(NASTY) >= 10
        monkeypatch.setattr(charts, "svg", lambda plot, label, height=3.0: "")  # drawn once is enough


# --- several ----------------------------------------------------------------------------------------------------------


def test_two_students_side_by_side(small: dict[str, Any], undrawn: None, tmp_path: Path) -> None:
    other = copy.deepcopy(small)
    other["model"], other["settings"]["window"], other["settings"]["dtype"] = "runs/wide", 128, "bfloat16"
    other["columns"]["student"]["tasks"]["embedded_piqa"]["items"] = [0.0] * 40
    for bucket in other["columns"]["student"]["perplexity"]["by_position"][:1]:
        bucket["end"] = 63
    found = Page(page.write([small, other], tmp_path / "new" / "both.html").read_text(encoding="utf-8"))
    header = ["", "source", "window of runs/demo/merged", "window of runs/wide", "runs/demo/merged", "runs/wide"]
    assert header in [table[0] for table in found.tables]
    (differing,) = (table for table in found.tables if table[0] == ["setting", "runs/demo/merged", "runs/wide"])
    assert differing[1:] == [["dtype", "float32", "bfloat16"], ["window", "64", "128"]]
    assert found.headings[0] == "Settings that differ"
    (pair,) = (table for table in found.tables if table[0][0] == "runs/wide minus")
    assert pair[0][1:] == ["source", "window of runs/wide", "runs/demo/merged"]
    piqa = next(row for row in pair if row[0] == "PIQA, points")
    assert piqa[3].startswith("-65.0")  # 0 of 40 right against 26
    buckets = {row[0]: row[1:] for table in found.tables for row in table if row[0].startswith("… at 1–")}
    assert buckets["… at 1–62"] == ["", "", "", "", "67.46"] and buckets["… at 1–63"][-1] == ""


def test_students_of_one_name_are_told_apart(small: dict[str, Any], undrawn: None) -> None:
    small["model"] = "window"
    text = page.render([small, copy.deepcopy(small)])
    assert Page(text).tables[0][0] == ["", "source", "window", "window (2)", "window (3)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda other: other.update(suite="paper"), r"another suite \(paper here, smoke there\)"),
        (
            lambda other: other["settings"]["suite"].update(limit=39),
            r"suite \(both named smoke, but with other contents",
        ),
        (lambda other: other["settings"]["source"].update(id="a/b"), r"another source \(a/b .* here, Hugging.* there"),
        (
            lambda other: other["settings"].update(seed=1, limit=9),
            r"limit \(9 here, 40 there\), seed \(1 here, 0 there",
        ),
        (lambda other: other["columns"].pop("student"), "no column student"),
        (lambda other: other["columns"]["student"]["tasks"]["mmlu"].update(prompts="x"), "other prompts in mmlu"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_paragraph(small: dict[str, Any], change: Any, message: str) -> None:
    other = copy.deepcopy(small) | {"model": "runs/other"}
    change(other)
    with pytest.raises(InputError, match=f"^runs/other: .*{message}") as error:
        page.render([small, other])
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written(small: dict[str, Any], undrawn: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        page.write([small], tmp_path / "file" / "report.html")
    assert page.beside(tmp_path / "results.json") == tmp_path / "report.html"
    assert page.beside(tmp_path / "other.json") == tmp_path / "other.html"


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_metrics_and_limits(results: dict[str, Any]) -> None:
    columns, summary = results["columns"], results["summary"]
    found = {name: metric.of(results) for name, metric in verdict.METRICS.items()}
    assert found["perplexity_ratio"] == pytest.approx(37.0198 / 27.9570, abs=1e-4)
    assert found["recovery"] == summary["recovery"]["student"]["raw"]
    assert found["memory_gain"] == summary["memory"]["loss"]
    assert found["kl"] == columns["student"]["behaviour"]["kl"]["value"]
    entries = columns["student"]["recall"]
    assert found["recall"] == pytest.approx(sum(entry["value"] for entry in entries) / len(entries))
    below = {name: value - 1e-6 for name, value in found.items()}
    above = {name: value + 1e-6 for name, value in found.items()}

    def names(limits: dict[str, float]) -> set[str]:
        return {line.split()[2] for line in verdict.shortfalls(results, limits)}

    assert names(below) == {"perplexity_ratio", "kl"} and names(above) == {"recovery", "memory_gain", "recall"}
    empty = {"columns": {"student": {}}, "summary": {"recovery": {}, "memory": None, "paired": {}}}
    lines = verdict.shortfalls(empty, verdict.parse_limits(["kl=1", "recall=.5", "recovery=0", "memory_gain=0"]))
    assert len(lines) == 4 and all("was not measured" in line for line in lines)
    wrong = {"recal=1": "Did you mean 'recall'", "0.9": "unknown metric", "kl": "found ''", "kl=nan": "finite"}
    for text, message in wrong.items():
        with pytest.raises(InputError, match=f"--fail-under {text}: .*{message}"):
            verdict.parse_limits([text])


def test_the_answer_follows_from_the_checks(small: dict[str, Any]) -> None:
    def holds(results: dict[str, Any]) -> list[bool | None]:
        return [check.holds for check in verdict.checks(results)]

    assert holds(small) == [True, True, False, None]
    assert verdict.answer(verdict.checks(small))[1].startswith("Not in place of the source")
    good = copy.deepcopy(small)
    good["columns"]["student"]["perplexity"]["value"] = 28.0
    assert verdict.answer(verdict.checks(good)) == (None, "Cannot be told yet: see the open checks below")
    good["summary"]["paired"]["source"]["average"] = {"difference": 0.0, "low": -0.01, "high": 0.01}
    assert verdict.answer(verdict.checks(good)) == (True, "Yes: it keeps the source's quality")
    good["summary"]["paired"]["source"]["average"] = {"difference": -0.1, "low": -0.11, "high": -0.09}
    assert holds(good) == [True, True, True, False]
    good["summary"]["memory"] |= {"loss": -0.1, "low": -0.2, "high": -0.01}
    assert verdict.answer(verdict.checks(good))[1].startswith("No: the memory")
    good["summary"]["paired"]["window"]["loss"] = {"difference": 0.1, "low": 0.0, "high": 0.2}
    assert verdict.answer(verdict.checks(good))[1].startswith("No: the window control")
    assert not holds({"columns": {}, "summary": {"paired": {}, "memory": None, "recovery": {}}})[0]


def test_the_sentence_by_hand(results: dict[str, Any]) -> None:
    text = verdict.sentences(results)
    assert "Its perplexity is 1.32 times the source's (window control: 1.50 times)." in text
    assert "It keeps 93.1 % of the source's average on tasks (window control: 94.8 %)." in text
    assert "The memory takes 12.7 % off the perplexity beyond the window (95 % interval 11.7 to 13.7 %)." in text
    # 46080 bytes per token: 103 tokens here, 32768 there; 0.064 s against 0.061 + 0.32768 s
    assert (
        "At a context of 32768 tokens its cache takes 4.53 MiB, the source's 1.41 GiB, and a token takes 0.16" in text
    )


# --- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """(page.querySelectorAll("details").forEach(part => { part.open = true }), {
  width: page.documentElement.scrollWidth,
  figures: [...page.querySelectorAll("figure > svg")].map(svg => {
    const box = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
    const inside = texts.map(text => text.getBoundingClientRect());
    return {
      width: box.width, height: box.height, shapes: svg.querySelectorAll("path, use").length,
      smallest: box.width / svg.viewBox.baseVal.width
        * Math.min(...texts.map(text => parseFloat(getComputedStyle(text).fontSize))),
      filled: [...svg.querySelectorAll("path")].filter(path => {
        const shape = path.getBoundingClientRect(), colour = getComputedStyle(path).fill;
        return shape.width > 4 && shape.height > 4 && !["none", "rgb(255, 255, 255)"].includes(colour);
      }).length,
      outside: inside.filter(text => text.left < box.left - 6 || text.right > box.right + 6).length,
    };
  }),
})"""


def opened(content: str, folder: Path) -> tuple[Any, str, set[str]]:
    """What PROBE measured on a phone, what the browser logged, and the addresses that it asked for."""
    log = folder / "net.json"
    flags = ("--dump-dom", "--enable-logging=stderr", "--v=0", f"--log-net-log={log}")
    ended = browsers.open_page(content, 390, *flags, probe=PROBE)
    # The browser asks for updates of its own; what a page asks for carries this mark (blink_resource_loader).
    addresses = set(re.findall(r'"traffic_annotation":101845102,"url":"((?:https?|wss?)://[^"]+)"', log.read_text()))
    return json.loads(browsers.measured(ended)), ended.stderr, addresses


@pytest.mark.skipif(browsers.browser() is None, reason="no Chromium or Chrome found: apt-get install chromium")
def test_a_browser_draws_it_on_a_phone_and_asks_nobody(html: str, read: Page, tmp_path: Path) -> None:
    found, log, addresses = opened(html, tmp_path)
    assert "CONSOLE" not in log and not addresses
    assert found["width"] == 390, "nothing sticks out sideways"
    assert len(found["figures"]) == len(read.figures)
    for figure, label in zip(found["figures"], read.figures, strict=True):
        assert figure["width"] >= 340 and figure["height"] >= 40 and figure["shapes"] > 4, label
        assert figure["smallest"] >= 8.5 and not figure["outside"], label
        if label.startswith("Recall"):
            assert figure["filled"] == label.count(" % at "), label
    # The same look at a page that does ask and does complain.
    bad = (
        '<img src="http://example.invalid/a.png"><style>@font-face { font-family: x; src: url(https://b.invalid/x) }'
        "</style><p style='font-family: x; width: 500px'>text<figure><svg></svg></figure>"
        "<script>console.error(1)</script>"
    )
    found, log, addresses = opened(bad, tmp_path)
    assert addresses == {"http://example.invalid/a.png", "https://b.invalid/x"} and "CONSOLE" in log
    assert found["width"] > 390 and found["figures"][0]["shapes"] == 0


@pytest.mark.skipif(browsers.browser() is None, reason="no Chromium or Chrome found: apt-get install chromium")
def test_the_verdict_fits_the_first_screen_of_a_laptop(html: str) -> None:
    probe = "page.querySelector('header').getBoundingClientRect().bottom"
    assert float(browsers.measured(browsers.open_page(html, 1280, "--dump-dom", probe=probe))) <= 720
