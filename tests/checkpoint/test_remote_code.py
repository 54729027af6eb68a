"""Folders that bring their code along open without this package, and compute the same."""

import inspect
import json
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.conversion import recipe_of
from helpers.tiny import save_source, tiny_model

from linearize.checkpoint import remote_code
from linearize.checkpoint.manifest import verify
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.errors import InputError
from linearize.hub import push
from linearize.model.mixers import MIXERS
from linearize.model.modeling import linearize_
from linearize.model.ops import clusters as own

STRANGER = """
import importlib.util, sys
assert importlib.util.find_spec("linearize") is None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, again, logits = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise SystemExit("it opened as something else")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
x = torch.arange(3, 63).view(2, 30)
greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
mask = torch.ones_like(x)
with torch.no_grad():
    torch.save([model(x).logits, model.generate(x, attention_mask=mask, **greedy)], logits)
model.save_pretrained(again)
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that has what this one has, but for the package. scripts/check_with_code.sh
    makes one by installing PyTorch and transformers, which takes minutes."""
    place = tmp_path_factory.mktemp("stranger") / "venv"
    venv.create(place, symlinks=True)
    paths = (sysconfig.get_path("purelib", vars={"base": str(place)}), sysconfig.get_path("purelib"))
    for installed in Path(paths[1]).iterdir():
        if "linearize" not in installed.name and not (Path(paths[0]) / installed.name).exists():
            (Path(paths[0]) / installed.name).symlink_to(installed)
    return place / "bin" / "python"


def test_convert_writes_it(llama_folder: Path, tmp_path: Path) -> None:
    out = convert(locate(str(llama_folder)), recipe_of(llama_folder, mixer={"name": "gla"}), tmp_path, with_code=True)
    assert verify(out) == []
    assert json.loads((out / "config.json").read_text())["auto_map"] == remote_code.AUTO_MAP
    assert (out / remote_code.FILE).read_text() == remote_code.code()


@pytest.mark.slow
def test_opens_without_the_package_with_the_same_logits(stranger: Path, tmp_path: Path) -> None:
    """One layer of each mixer, one in which heads stay softmax, and one of the source's."""
    model: Any = tiny_model("llama", layers=len(MIXERS) + 2)
    for index, name in enumerate(MIXERS):
        linearize_(model, {"name": name, "window": 8, "sinks": 2}, [index])
    linearize_(model, {"name": "gla", "window": 8, "sinks": 2, "softmax_heads": [1]}, [len(MIXERS)])
    folder = tmp_path / "out"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": remote_code.AUTO_MAP}))
    (folder / remote_code.FILE).write_text(remote_code.code())
    for again in ("once", "twice"):  # what a stranger saves can be opened by a stranger
        command = [stranger, "-I", "-c", STRANGER, folder, tmp_path / again, tmp_path / "logits"]
        environment = {"HF_MODULES_CACHE": str(tmp_path / f"modules-{again}"), "PATH": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        folder = tmp_path / again
    logits, generated = torch.load(tmp_path / "logits")
    x = torch.arange(3, 63).view(2, 30)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with torch.no_grad():
        assert torch.equal(model(x).logits, logits)
        assert torch.equal(model.generate(x, attention_mask=torch.ones_like(x), **greedy), generated)


def test_the_file_holds_every_module_of_the_model_and_nothing_else() -> None:
    text = remote_code.code()
    compile(text, "code", "exec")
    held = {line.split("'")[1] for line in text.splitlines() if line.startswith("_MODULES['")}
    assert {"model.mixers.gla", "model.ops.additive", "model.cache", "model.modeling", "errors"} <= held
    assert {name.split(".")[0] for name in held} == {"", "errors", "model"}
    # transformers looks for a file behind every relative import that it reads, also inside a text.
    assert get_relative_imports_of(text) == []
    assert "/wt-" not in text and str(Path.home()) not in text


def get_relative_imports_of(text: str) -> list[str]:
    return re.findall(r"^\s*(?:from|import)\s+(\.\S*)", text, flags=re.MULTILINE)


def test_push_can_bring_the_code_along(llama_folder: Path, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    out = convert(locate(str(source)), recipe_of(source, mixer={"name": "gla"}), tmp_path / "out")
    files = push.plan(out, "me/model", with_code=True).files
    assert json.loads(bytes(files["config.json"]))["auto_map"] == remote_code.AUTO_MAP  # type: ignore[arg-type]
    folder = tmp_path / "pushed"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert verify(folder) == []
    assert "modeling_linearized.py" in json.loads((folder / "linearize.json").read_text())["files"]
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    assert "trust_remote_code" not in push.card(out)
    assert not (out / remote_code.FILE).exists()


def test_an_adapter_has_no_code_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--with-code: .* holds an adapter"):
        push._code(tmp_path, {}, None)


def test_the_source_of_what_a_folder_carries_can_be_read(tmp_path):
    """Triton compiles what `inspect` reads. In a process of its own: the carried classes take the place of ours."""
    (tmp_path / "carried.py").write_text(remote_code.code(), encoding="utf-8")
    code = (
        "import inspect, sys, carried; "
        "print(inspect.getsource(sys.modules[carried._Finder.package + '.model.ops.clusters']._merges), end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == inspect.getsource(own._merges), done.stderr
