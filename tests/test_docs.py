"""README and docs: every command and program runs, on tiny models; generated parts are fresh; links lead somewhere."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from helpers.demo import enter_demo, leave_demo, make_runs
from helpers.scripts import SCRIPTS

from linearize import cli

ROOT = SCRIPTS.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r'(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```',
    flags=re.DOTALL | re.MULTILINE,
)
ELSEWHERE = re.compile(r"(pip install|mkdocs|\. \.venv/bin/activate|(bash|python) (?P<script>scripts/[\w.]+))( |$)")
"""Commands that no test repeats: they install something, or are scripts that only have to be there."""
PLACEHOLDERS = ("my-org/my-model --tiny",)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it stands for, its text, and why it is not run."""

    language: str
    title: str | None
    text: str
    why: str | None


def blocks(page: Path) -> list[Block]:
    content = page.read_text(encoding="utf-8")
    return [Block(m["language"], m["title"], m["text"], m["why"]) for m in BLOCK.finditer(content)]


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        enter_demo(folder, patch)
        make_runs(folder)
        yield folder
    leave_demo()


def smaller(text: str) -> str:
    """A command or recipe of the documentation at the size of a test."""
    text = re.sub(r"(?<!_)tokens([=:]\s*)\d+", r"tokens\g<1>512", text)
    text = re.sub(r"seq_len([=:]\s*)\d+", r"seq_len\g<1>256", text)
    text = re.sub(r"limit=\d+", "limit=1", text)
    text = re.sub(r"--(limit|steps) \d+", lambda match: f"--{match[1]} {1 if match[1] == 'limit' else 3}", text)
    return re.sub(r"--contexts [\d,]+", "--contexts 256", text)


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = shlex.split(smaller(line))
    verb = arguments[1]
    if verb == "eval" and "--limit" not in arguments:
        arguments += ["--limit", "1"]
    if verb == "generate" and "--max-new-tokens" not in arguments:
        arguments += ["--max-new-tokens", "8"]
    if verb in ("transfer", "distil", "long"):
        small = ("tokens=512", "seq_len=256", "batch=2")
        arguments += [
            f"--set=train.{verb}.{each}" for each in small if each.partition("=")[0] not in " ".join(arguments)
        ]
    if verb in ("select", "allocate") and "--tokens" not in arguments:
        arguments += ["--tokens", "512", "--seq-len", "256"]
    if "--out" in arguments and verb != "run":  # an example on another page has made it already
        out = Path(arguments[arguments.index("--out") + 1])
        if out.is_dir() and "--overwrite" not in arguments:
            shutil.rmtree(out)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None) or "--fail-under" in line and ended.value.code == 1, line


def run_block(block: Block, variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if block.title is not None:
        times = 60 if block.language == "jsonl" else 1  # stands for a text that is longer
        Path(block.title).write_text(smaller(block.text) * times, encoding="utf-8")
    if block.language in ("yaml", "yml"):
        yaml.safe_load(block.text)
    elif block.language == "python":
        exec(compile(smaller(block.text), block.title or "a block of python", "exec"), variables)
    elif block.language == "bash":
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            line = line.partition("  #")[0].strip()
            if line.startswith("linearize ") and not any(word in line for word in PLACEHOLDERS):
                run_command(line, monkeypatch)
            elif line and not line.startswith(("#", "linearize ")):
                for part in line.split(" && "):
                    known = ELSEWHERE.match(part)
                    assert known, f"what is this, and how is it tested? {part}"
                    assert known["script"] is None or (ROOT / known["script"]).is_file(), part


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_block_of_a_page_runs(
    page: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stale in (tiny_world / "runs").iterdir():
        if stale.name not in ("demo", "best", "a", "b"):
            shutil.rmtree(stale)
    variables: dict[str, Any] = {"__name__": "docs"}
    sys.modules["docs"] = ModuleType("docs")  # dataclasses look up the module of a class
    for block in blocks(page):
        if block.why is None:
            run_block(block, variables, monkeypatch)
        else:
            assert len(block.why) > 20, "say why it is not run"


def test_every_page_has_a_picture_or_an_example() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        content = page.read_text(encoding="utf-8")
        assert page.name in ("licences.md", "faq.md") or "![" in content or blocks(page), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_are_there(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if "://" in target or path.startswith("results/"):  # put there by scripts/mkdocs_hooks.py, from eval/results
            assert "://" in target or (ROOT / "eval" / path).is_file(), target
            continue
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor and other.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"


def test_the_messages_that_are_explained_are_in_the_code() -> None:
    explained = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "linearize").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code).lower()
    foreign = ("no attribute", "The checkpoint", "nothing appears", "it answers nonsense", "Only the last")
    for heading in re.findall(r"^## (.+)$", explained, flags=re.MULTILINE):
        if not heading.startswith(foreign):
            for part in heading.split(" … "):
                assert part.lower() in code, f"nobody says this: {part}"
