"""Every example of every docstring, and every command and program of the README, run on tiny models that stand in for
the real ones: same names, same folders, two layers."""

import doctest
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny import save_source, tiny_model

import linearize
from linearize import cli
from linearize.evaluation import suite as suites
from linearize.recipe import load as recipes
from linearize.recipe import templates
from linearize.recipe.resources import package_folder

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
NOT_HERE = ("llama-3-8b", "runs/llama", "pip install", "scripts/", "mine.yaml", "A.json", "hf auth", "lm_eval", "DIR")
"""What a command of the README needs that a test has not: gated weights, an installation, a file of the reader's."""


def modules_with_examples() -> list[str]:
    """Found by their text: importing all of them would make every collection of tests slow."""
    root = Path(linearize.__file__).parent
    names = {path: ".".join(path.relative_to(root.parent).with_suffix("").parts) for path in sorted(root.rglob("*.py"))}
    return [name.removesuffix(".__init__") for path, name in names.items() if ">>> " in path.read_text("utf-8")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with runs/demo as the README leaves it, in which `smollm2-135m` is a tiny Llama."""
    folder = tmp_path_factory.mktemp("examples")
    source = save_source(folder / "source", layers=6, max_position_embeddings=4096)
    shipped = folder / "recipes"
    shipped.mkdir()
    for path in package_folder("recipes").glob("*.yaml"):
        (shipped / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    values = yaml.safe_load((shipped / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    small = {"tokens": 512, "seq_len": 256, "batch": 2, "watch": 0}
    values |= {"source": {"id": str(source)}, "calibrate": {"tokens": 512, "seq_len": 256}}
    suites_folder = folder / "eval" / "suites"
    suites_folder.mkdir(parents=True)
    (folder / "eval" / "data").symlink_to(package_folder("eval") / "data")
    for path in (package_folder("eval") / "suites").glob("*.yaml"):
        suite = yaml.safe_load(path.read_text(encoding="utf-8")) | {"limit": 1}
        suite["perplexity"] = [{"text": "wikitext2_valid", "length": 512, "blocks": 2}]
        (suites_folder / path.name).write_text(yaml.safe_dump(suite), encoding="utf-8")
    values["train"] = [{**stage, **small} for stage in values["train"]]
    (shipped / "smollm2-135m.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARIZE_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.setattr(templates, "package_folder", lambda name: shipped if name == "recipes" else package_folder(name))
        templates.shipped.cache_clear()
        patch.setattr(suites, "package_folder", lambda name: folder / name)
        linearize.convert("smollm2-135m", "runs/demo/0-converted")
        linearize.calibrate("runs/demo/0-converted", "runs/demo/0-calibrated")
        linearize.train("runs/demo/0-converted", "runs/demo/1-distil")
        linearize.merge("runs/demo/1-distil", "runs/demo/merged")
        linearize.evaluate("runs/demo/merged", limit=1)
        for name in ("a", "b"):
            (folder / "runs" / name).mkdir()
            (folder / f"runs/{name}/results.json").write_bytes((folder / "runs/demo/merged/results.json").read_bytes())
        (folder / "runs/demo/results.json").write_bytes((folder / "runs/demo/merged/results.json").read_bytes())
        yield folder
    templates.shipped.cache_clear()


class Checker(doctest.OutputChecker):
    """Where an example says what comes out, that is what must come out; where it says nothing, anything may."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder().find(module, name) if test.examples]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_run(name: str, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, test in enumerate(examples(name)):
        out = f"example-{name}-{index}"
        for example in test.examples:  # each writes into a folder of its own
            example.source = re.sub(r'(, (?:out=)?)"runs/demo/([\w-]+)"(?!\])', rf'\1"{out}/\2"', example.source)
            example.want = example.want.replace("runs/demo/0-converted", f"{out}/0-converted")
        test.globs |= {"linearize": linearize, "torch": torch, "model": tiny_model(layers=2), "recipe": recipes}
        said: list[str] = []
        runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        runner.run(test, out=said.append)
        assert runner.failures == 0, "".join(said)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("linearize ") and not any(word in line for word in NOT_HERE)]


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_readme_run(command: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = re.sub(r"\W+", "-", command)[:80]
    arguments = shlex.split(re.sub(r"(--out) runs/", rf"\1 {folder}/", command).replace("keep:20,23", "keep:2,3"))
    if "eval" in arguments:
        arguments += ["--limit", "1"]
    if "run" in arguments or "train" in arguments:  # a budget of the reader's is not one of a test
        arguments = [re.sub(r"tokens=\d+", "tokens=512", argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None), command


@pytest.mark.parametrize("program", blocks("python"))
def test_the_programs_of_the_readme_run(program: str, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variables: dict[str, Any] = {}
    exec(compile(re.sub(r'(, )"runs/demo/', r'\1"readme/', program), "README.md", "exec"), variables)
    assert capsys.readouterr().out
