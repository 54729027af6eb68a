"""Recipes and suites of strangers: a few bytes that would become gigabytes, and names that would lead elsewhere."""

import time
from pathlib import Path

import pytest

from linearize.errors import InputError
from linearize.evaluation import suite as suites
from linearize.recipe import load as recipes
from linearize.recipe.schema import Recipe, Source
from linearize.recipe.text import read_yaml

SOURCE = "source: {id: x}\n"
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
HUGE = {
    "aliases": (LAUGHS, "more than 20,000 values"),
    "aliases of a long text": ("d: &d " + "x" * 300_000 + f"\ne: [{','.join(['*d'] * 999)}]\n", "more than 20,000"),
    "merge keys": ("a: &a {k: v}\n" + "".join(f"b{i}: &b{i} {{<<: [{','.join(['*a'] * 9)}]}}\n" for i in range(3000)),
                   "more than 20,000"),
    "an alias of itself": ("a: &a [*a]\n", "something that holds it"),
    "layers": ("convert: {layers: 0-999999999}\n", "below 1000"),
    "layers kept": ("convert: {layers: {keep: 0-999999999}}\n", "below 1000"),
    "layer": (f"convert: {{layers: 0x{'f' * 9000}}}\n", "below 1000"),
    "many layers": ("convert: {layers: '" + "0-900," * 5000 + "1'}\n", "at most 1000"),
    "depth": ("a: " + "[" * 3000 + "]" * 3000, "nested too deep"),
    "digits": (f"train: [{{tokens: {'9' * 5000}}}]\n", "not valid YAML"),
    "hexadecimal digits": (f"train: [{{tokens: 0x{'f' * 9000}}}]\n", "a number of 36000 bits"),
    "seed": ("train: [{seed: 99999999999999}]\n", "less than 4294967296"),
    "window": (f"convert: {{mixer: {{name: gla, window: 1{'0' * 400}}}}}\n", "expected a number between"),
    "infinite rate": ("train: [{lr: .inf}]\n", "finite"),
    "infinite setting": ("convert: {mixer: {name: gla, gate_normalizer: .inf}}\n", "expected a number between"),
    "long value": ("status: " + "x" * 100_000 + "\n", "'run'"),
    "bytes": ("# " + "x" * 2_000_000, "more than 1,000,000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", HUGE)
def test_what_would_become_huge_is_refused_at_once_and_in_a_few_words(case: str, tmp_path: Path) -> None:
    text, expected = HUGE[case]
    (tmp_path / "a.yaml").write_text(SOURCE + text)
    started = time.perf_counter()
    with pytest.raises(InputError) as error:
        recipes.load(tmp_path / "a.yaml")
    assert expected in str(error.value) and len(str(error.value)) < 1000 + len(str(tmp_path))
    assert time.perf_counter() - started < 20  # seconds; without the check it takes all memory, or for ever


@pytest.mark.parametrize("case", ["aliases", "depth", "bytes"])
def test_suites_are_read_by_the_same_reader(case: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(HUGE[case][0])
    with pytest.raises(InputError, match=HUGE[case][1]):
        suites.load(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eval: {suite: a}\neval: {suite: b}\n", "line 3: key 'eval' is given twice"),
        ("1: 2\n", "keys should be strings"),
        ("convert: {mixer: {name: [gla]}}\n", "unknown mixer"),
        ("convert: {mixer: {name: gla, 1: 2}}\n", "mixer.1: unknown key"),
        ("name: 2001-99-99\n", "not valid YAML"),
        ('description: "\\ud800"\n', "not valid YAML"),
        ("? [1]\n: 2\n", "not valid YAML"),
        ("name: !!python/object/apply:os.system [id]\n", "not valid YAML"),
        ("train: [{tokens: 5}]\n", "train.0: tokens 5 is less than one step"),
    ],
)
def test_odd_files(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SOURCE + text)
    with pytest.raises(InputError) as error:
        recipes.load(tmp_path / "a.yaml")
    assert expected in str(error.value) and "weight_decay" not in str(error.value), "not the whole stage"


def test_aliases_that_people_write_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"{SOURCE}train:\n  - &one {{name: one, lr: 0.1}}\n  - {{<<: *one, name: two}}\n")
    assert [stage.lr for stage in recipes.load(tmp_path / "a.yaml").train] == [0.1, 0.1]


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for name, expected in {"folder": "is a folder", "empty": "holds no mapping", "binary": "not valid YAML"}.items():
        for read in (read_yaml, recipes.load, suites.load):
            with pytest.raises(InputError, match=expected):
                read(tmp_path / f"{name}.yaml")
    for name in ("a" * 999, "a\0b", "a\ud800"):
        with pytest.raises(InputError):
            recipes.load(f"{name}.yaml")


@pytest.mark.parametrize("name", ["../../x", "/abs", "..", ".", "a\\b", "c:d", "a" * 300, "é" * 60, "a\x1bb", "a\nb"])
def test_a_name_is_one_part_of_a_path(name: str) -> None:
    for key, values in {"name": {"name": name}, "train.0.name": {"train": [{"name": name}]}}.items():
        with pytest.raises(InputError, match=f"recipe: {key}: found"):
            recipes.from_dict({"source": {"id": "x"}, **values})


def test_a_suite_has_a_name_of_the_same_kind(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: ../x\ntasks: [{task: piqa}]\n")
    with pytest.raises(InputError, match=r"name: found '\.\./x'"):
        suites.load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("source", "name"), [("../..", None), (".", None), ("org/model", "model"), ("a/b c.gguf", "b c")]
)
def test_a_run_stays_in_its_folder(source: str, name: str | None) -> None:
    folder = recipes.run_folder(Recipe(Source(source)))
    assert folder.parent == Path("runs") and folder.name == (name or Path(source).resolve().name or "model")


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["train.distil.tokens=5"], "--set train.distil.tokens=5"),
        (["train.0.lr=-1"], "--set train.0.lr=-1"),
        (["convert.mixer.window=0"], "--set convert.mixer.window=0"),
        (["convert={layers: x}"], "--set convert={layers: x}"),
    ],
)
def test_an_override_is_blamed_for_what_it_breaks(overrides: list[str], blamed: str) -> None:
    with pytest.raises(InputError) as error:
        recipes.load("smollm2-135m", overrides)
    assert str(error.value).startswith(f"{blamed} (on recipes/smollm2-135m.yaml): ")


def test_one_key_has_one_value() -> None:
    for pair in (["name=a", "name=b"], ["train.0.lr=1", "train.distil.lr=2"]):
        with pytest.raises(InputError, match="one key is given two values"):
            recipes.load("smollm2-135m", pair)
    assert recipes.load("smollm2-135m", ["name=a", "name=a"]).name == "a"
