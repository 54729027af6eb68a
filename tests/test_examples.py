"""Every example of every docstring, run on tiny models that stand in for the real ones: same names, same folders."""

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.demo import enter_demo, leave_demo, make_runs
from helpers.tiny import tiny_model

import linearize
from linearize.recipe import load as recipes

pytestmark = pytest.mark.slow


def modules_with_examples() -> list[str]:
    """Found by their text: importing all of them would make every collection of tests slow."""
    root = Path(linearize.__file__).parent
    names = {path: ".".join(path.relative_to(root.parent).with_suffix("").parts) for path in sorted(root.rglob("*.py"))}
    return [name.removesuffix(".__init__") for path, name in names.items() if ">>> " in path.read_text("utf-8")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with runs/demo as the README leaves it, in which `smollm2-135m` is a tiny Llama."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        enter_demo(folder, patch)
        make_runs(folder)
        yield folder
    leave_demo()


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
