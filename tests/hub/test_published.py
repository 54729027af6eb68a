"""What a push sends: what belongs to a model, names in the place of paths, and no code of others unasked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.conversion import run
from helpers.tiny import save_source

from linearize.checkpoint import remote_code
from linearize.checkpoint.companions import copy_companions
from linearize.checkpoint.manifest import verify, write_manifest
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.conversion.export import export
from linearize.hub.names import is_published, named, of_local_source, without_path
from linearize.hub.push import Upload, plan
from linearize.recipe import load as recipes

REGRESSION = Path(__file__).parents[1] / "regression"
WINDOWS, HOME = "C:\\Users\\jo\\secret", "/home/jo/secret"


def sent(upload: Upload) -> dict[str, bytes]:
    return {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in upload.files.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REGRESSION / "merged", tmp_path / "folder"))


def put(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


# -- names of paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [HOME, WINDOWS, "~/secret", "~jo/secret", "file:///home/jo/secret", "\\\\nas\\jo\\secret"]
)
def test_no_file_tells_where_something_lies(path: str, folder: Path) -> None:
    put(folder / "config.json", _name_or_path=path, note=f"made from {path}, yesterday", deep={"a": [{"b": path}]})
    put(folder / "generation_config.json", origin=path)
    put(folder / "tokenizer_config.json", name_or_path=path, special_tokens_map_file=path, tokenizer_file=path)
    put(folder / "linearize.json", training={"model": path, "command": f"linearize train {path} --out x"})
    recipe = {"description": f"the text of {path}", "source": {"id": path}, "data": [{"path": path}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "README.md").write_text(f"Made from [{path}]({path}) and `{path}`; see https://host.org{HOME}.\n")
    for name in ("report.html", "trainer_state.json", "training_args.bin", "nohup.out", "notes.txt", "run.log"):
        (folder / name).write_text(path)
    files = sent(plan(folder, "me/x"))
    assert not files.keys() & {"report.html", "trainer_state.json", "training_args.bin", "nohup.out", "notes.txt"}
    for name, content in files.items():
        text = content.decode("utf-8", errors="replace").replace("https://host.org/home/jo/secret", "")
        assert "jo" not in text.replace("major", "") or name in ("tokenizer.json", "model.safetensors"), (name, path)
    assert yaml.safe_load(files["recipe.yaml"])["data"] == [{"path": "secret"}]
    assert json.loads(files["config.json"])["note"] == "made from secret, yesterday"


@pytest.mark.parametrize("token", ["/srv", "/home/jo", "C:\\Users", "~/x"])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "special_tokens_map.json", "chat_template.jinja"])
def test_vocabularies_and_templates_stay_as_they_are(token: str, name: str) -> None:
    content = json.dumps({"added_tokens": [{"content": token}], "model": {"vocab": {token: 1, "srv": 2}}}).encode()
    assert named(name, content) is content


@pytest.mark.parametrize("token", ["/srv", "/home/jo", "~/x"])
def test_tokens_and_templates_within_settings_stay_too(token: str) -> None:
    values = {"eos_token": token, "added_tokens_decoder": {"5": {"content": token}}, "chat_template": token}
    assert named("tokenizer_config.json", json.dumps(values).encode()) == json.dumps(values).encode()
    values = {"stop_strings": [token], "eos_token": token}
    assert named("generation_config.json", json.dumps(values).encode()) == json.dumps(values).encode()


@pytest.mark.parametrize(
    "text", ["either/or and 1/2/3", "https://host.org/home/jo/x", "acme/text", "see /v1/chat", "a: b", "</s><a/b/c>"]
)
def test_what_is_no_path_stays(text: str) -> None:
    assert json.loads(named("config.json", json.dumps({"a": text}).encode()))["a"] == text
    assert named("README.md", text.encode()) == text.encode()


def test_names_of_a_folder_that_the_trainer_of_transformers_wrote() -> None:
    text = b"a version of [/home/jo/base](https://huggingface.co//home/jo/base) on C:/data/jo/text"
    assert named("README.md", text) == b"a version of [base](base) on text"
    assert without_path("file:///home/jo/base/") == "base"


@pytest.mark.parametrize(
    ("name", "goes"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("additional_chat_templates/tools.jinja", True),
        ("LICENSE.txt", True),
        ("images/chart.png", True),
        ("tokenizer.model.v3", True),
        ("checkpoint-5/model.safetensors", False),
        ("sub/config.json", False),
        ("training_args.bin", False),
        ("wandb/run.json", False),
        ("tokenization_x.py", False),
        (".env", False),
    ],
)
def test_what_goes_up(name: str, goes: bool) -> None:
    assert is_published(name) == goes


def test_a_stray_shard_stays_here_and_the_manifest_fits(folder: Path, tmp_path: Path) -> None:
    shutil.copy(REGRESSION / "expected.safetensors", folder / "private.safetensors")
    (folder / "notes.txt").write_text("mine")
    write_manifest(folder, {"source": None}, {})
    upload = plan(folder, "me/x")
    assert {"private.safetensors", "notes.txt"} <= set(upload.left) and "private.safetensors" in upload.text()
    (tmp_path / "sent").mkdir()
    for name, content in sent(upload).items():
        (tmp_path / "sent" / name).write_bytes(content)
    assert verify(tmp_path / "sent") == []


# -- code of others ----------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source whose tokenizer names code of its own, which imports more; evil.py is named by the model alone."""
    folder = save_source(tmp_path / "source", layers=2)
    (folder / "tokenization_x.py").write_text("from .helper import x\n")
    for name in ("helper.py", "evil.py", "stray.py"):
        (folder / name).write_text("x = 1\n")
    put(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.Tokenizer", None]})
    put(folder / "config.json", auto_map={"AutoConfig": "evil.Config"}, custom_pipelines={"p": {"impl": "evil.P"}})
    (folder / "USE_POLICY.md").write_text("policy")
    return folder


def code_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


OWN, FOREIGN = {remote_code.FILE}, {"tokenization_x.py", "helper.py"}


def converted(source: Path, out: Path, with_code: bool) -> Path:
    values = {"source": {"id": str(source)}, "convert": {"mixer": {"name": "gla", "window": 8, "sinks": 2}}}
    return convert(locate(str(source)), recipes.from_dict(values), out, with_code=with_code)


@pytest.mark.parametrize("asked", [False, True])
def test_code_of_others_travels_only_when_asked_for(asked: bool, source: Path, tmp_path: Path) -> None:
    out = converted(source, tmp_path / "out", asked)
    assert code_in(out) == (OWN | FOREIGN if asked else set()) and (out / "USE_POLICY.md").is_file()
    assert code_in(export(out, "source", tmp_path / "back")) == (FOREIGN if asked else set())
    (tmp_path / "next").mkdir()
    copy_companions(out, tmp_path / "next")
    assert code_in(tmp_path / "next") == (OWN | FOREIGN if asked else set())
    for folder in (out, tmp_path / "back", tmp_path / "next"):
        assert ("auto_map" in (folder / "tokenizer_config.json").read_text()) == asked
    (out / "stray.py").write_text("x = 1")
    plainly, coded = plan(out, "me/x"), plan(out, "me/x", with_code=True)
    names = [{name for name in upload.files if name.endswith(".py")} for upload in (plainly, coded)]
    assert names == [OWN if asked else set(), OWN | FOREIGN if asked else OWN]
    assert ("**Foreign code**: `helper.py`, `tokenization_x.py`" in coded.card) == asked
    assert "Foreign code" not in plainly.card and b"auto_map" not in sent(plainly)["tokenizer_config.json"]
    assert b"evil" not in b"".join(sent(coded)[name] for name in remote_code.SETTINGS if name in coded.files)


def test_code_that_takes_the_name_of_ours_is_replaced_and_named_code_is_dropped(source: Path, tmp_path: Path) -> None:
    out = converted(source, tmp_path / "out", True)
    (out / remote_code.FILE).write_text("print('evil')")
    assert sent(plan(out, "me/x"))[remote_code.FILE].decode() == remote_code.code()
    copy_companions(out, tmp_path)
    assert (tmp_path / remote_code.FILE).read_text() == remote_code.code()
    put(out / "config.json", auto_map={"AutoModelForCausalLM": "modeling_linearized.Evil"})
    files = sent(plan(out, "me/x"))
    assert not any(name.endswith(".py") for name in files) and b"auto_map" not in files["config.json"]


def test_a_card_written_by_hand_names_code_of_others_too(source: Path, tmp_path: Path) -> None:
    out = converted(source, tmp_path / "out", True)
    (out / "README.md").write_text("Mine.")
    assert "**Foreign code**: `helper.py`" in plan(out, "me/x", with_code=True).card
    assert plan(out, "me/x").card == "Mine."


def test_names_of_strangers_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", layers=2)
    out = run(source, tmp_path / "out", mixer={"name": "gla", "window": 8, "sinks": 2})
    values = json.loads((out / "config.json").read_text())
    values["linearize"]["source"] |= {"id": "x`](javascript:1)\n# Owned\n", "path": None}
    (out / "config.json").write_text(json.dumps(values))
    (out / "recipe.yaml").write_text("description: |\n  ```\n  # Owned\n  ````\n")
    lines = plan(out, "me/x").card.splitlines()
    assert "# Owned" not in lines and "`````yaml" in lines and lines.count("`````") == 1


def test_a_local_source_that_is_called_like_one_of_the_hub_is_named_by_its_last_part() -> None:
    recipe = b"source:\n  id: clients/acme\ndata:\n- path: texts/all.jsonl\n"
    assert b"clients" not in of_local_source(recipe)
    assert b"texts/" not in named("recipe.yaml", recipe)
    assert named("recipe.yaml", b"source:\n  id: org/name\n") == b"source:\n  id: org/name\n"
