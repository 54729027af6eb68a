"""One door from a folder or Hub id to a model that runs; what does not fit is named, never left out in silence."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_converted, save_source
from safetensors.torch import load_file, save_file

import linearize
from linearize.checkpoint import adapters
from linearize.checkpoint.open import base_folder, load, open_config, open_model, open_tokenizer, pick_device
from linearize.errors import InputError
from linearize.recipe.schema import Peft

IDS = torch.arange(20)[None]
FULL = Peft(method="full", roles=("q",), mixer=False)
FOLDERS = Path(__file__).parents[1] / "regression"


def save_adapters(folder: Path, base: Path, change: bool = True) -> Path:
    """LoRA adapters on q of a converted folder, with the tokenizer beside them."""
    wrapped = adapters.attach(open_model(base), Peft(r=2, roles=("q",)))
    weights = {name: weight.detach() for name, weight in wrapped.named_parameters() if weight.requires_grad}
    for name, weight in weights.items():
        if change and "lora_B" in name:
            weight.fill_(0.1)
    folder.mkdir()
    adapters.save(wrapped, weights, base, folder)
    open_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_converted(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapters(tmp_path / "adapter", base)


def rename(file: Path, old: str, new: str | None) -> None:
    """Give the tensors of a file other names, or leave them out."""
    tensors = load_file(file)
    kept = {
        name.replace(old, new or ""): value for name, value in tensors.items() if new is not None or old not in name
    }
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["gla", "calibrated", "selected", "adapters", "merged", "with-code"])
def test_what_every_stage_wrote_opens(name: str) -> None:
    model, tokenizer = load(FOLDERS / name)
    assert model(torch.tensor([tokenizer("The miller").input_ids])).logits.isfinite().all()
    assert not model.training and model.config.model_type == "linearized"
    assert not any("lora" in key for key in model.state_dict()) or name == "adapters"


def test_plain_folders_and_adapters_open_with_their_weights(tmp_path: Path, base: Path, adapter: Path) -> None:
    source = save_source(tmp_path / "source", layers=2)
    model, _ = load(source, dtype="bfloat16")
    assert (model.dtype, model.config.model_type) == (torch.bfloat16, "llama")
    with pytest.raises(InputError, match="plain llama model; run `linearize convert`"):
        open_model(source)
    plain, adapted = load(base)[0], load(adapter, device="cpu")[0]
    assert not torch.equal(plain(IDS).logits, adapted(IDS).logits)
    assert open_config(adapter).model_type == "linearized"


def test_adapters_find_their_base_beside_them_and_say_where_it_should_be(adapter: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(adapter, moved / "adapter")
    shutil.move(tmp_path / "base", moved / "base")
    assert base_folder(moved / "adapter") == moved / "base"
    shutil.rmtree(moved / "base")
    with pytest.raises(InputError, match="belong to the model in .*base, which is not there.*put it back"):
        load(moved / "adapter")


def damage(name: str, content: str | None):
    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)

    return change


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("config.json", None), "config.json: does not exist"),
        (damage("config.json", "{"), "config.json: .*cannot read this configuration"),
        (damage("config.json", '{"model_type": "linearized"}'), "no complete `linearize` block"),
        (damage("model.safetensors", None), "has a configuration but no weights"),
        (damage("model.safetensors", "version https://git-lfs"), "is a Git LFS pointer"),
        (damage("tokenizer.json", "{"), "has no usable tokenizer"),
        (truncate, "not a whole safetensors file .cut short"),
        (
            lambda folder: rename(folder / "model.safetensors", "q_proj", "p_proj"),
            "do not fit config.json .linearized.; missing: .*q_proj.*unexpected: .*p_proj",
        ),
        (
            lambda folder: rename(folder / "model.safetensors", "down_proj", None),
            "do not fit config.json .linearized.; missing: .*down_proj",
        ),
    ],
)
def test_damage_is_one_paragraph(base: Path, change, message: str) -> None:
    change(base)
    with pytest.raises(InputError, match=message) as caught:
        load(base)
    assert "\n" not in str(caught.value)


def test_plain_folders_need_all_their_weights_too(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", layers=2)
    rename(source / "model.safetensors", "down_proj", None)
    with pytest.raises(
        InputError, match="source: the weights do not fit config.json .*missing: model.layers.0.mlp.down_proj.weight"
    ):
        load(source)


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "./x", "acme/nothing"])
def test_unknown_names(name: str) -> None:
    for door in (load, open_config, open_tokenizer, open_model):
        with pytest.raises(InputError, match="no such folder|unknown model"):
            door(name)


def test_one_rule_chooses_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    assert pick_device() == torch.device("xpu")
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(InputError, match=f"device {name}: not on this machine"):
            pick_device(name)


# -- names of weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("new", "message"), [("lora_Z", "unknown: .*lora_Z.*missing: .*lora_B"), (None, "missing: ")])
def test_adapters_whose_names_do_not_match_are_not_put_on(adapter: Path, new: str | None, message: str) -> None:
    rename(
        adapter / "adapter_model.safetensors", "layers.1.self_attn.q_proj.lora_B", new and f"layers.1.self_attn.{new}"
    )
    with pytest.raises(InputError, match=f"names of the trained weights do not match the model; {message}"):
        load(adapter)
    with pytest.raises(InputError, match=f"names of the trained weights do not match the model; {message}"):
        adapters.attach(open_model(adapter), Peft(r=2, roles=("q",)), adapter)


def test_a_stage_goes_on_with_adapters_on_fewer_roles_only(adapter: Path) -> None:
    wrapped = adapters.attach(open_model(adapter), Peft(r=2, roles=("q", "k")), adapter)
    state = wrapped.state_dict()
    assert all(state[name].max() > 0.09 for name in state if "q_proj.lora_B" in name)
    assert not any(state[name].any() for name in state if "k_proj.lora_B" in name)
    with pytest.raises(InputError, match="unknown: .*q_proj"):
        adapters.attach(open_model(adapter), Peft(r=2, roles=("k",)), adapter)
    with pytest.raises(InputError, match="other settings"):
        adapters.attach(open_model(adapter), Peft(r=4, roles=("q",)), adapter)


@pytest.mark.parametrize("settings", [FULL, Peft(r=2, roles=("q",))])
def test_nothing_that_was_trained_is_left_out_of_the_result(base: Path, tmp_path: Path, settings: Peft) -> None:
    model = adapters.attach(open_model(base), settings)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    (tmp_path / "out").mkdir()
    (first, value), *rest = weights.items()
    with pytest.raises(InputError, match=f"missing: {first};"):
        adapters.save(model, dict(rest), base, tmp_path / "out")
    with pytest.raises(InputError, match="unknown: module.a"):
        adapters.save(model, weights | {"module.a": value}, base, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    adapters.save(model, weights, base, tmp_path / "out")
    open_tokenizer(base).save_pretrained(tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[0](IDS).logits, load(base)[0](IDS).logits)


def test_no_module_needs_a_posix_system() -> None:
    package = Path(linearize.__file__).parent
    for path in package.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not names & {"fcntl", "grp", "pwd", "resource", "termios"}, path


def test_a_template_of_its_own_travels_with_the_small_files(tmp_path: Path) -> None:
    from linearize.checkpoint.companions import copy_companions

    source, folder = save_source(tmp_path / "source", layers=1), tmp_path / "folder"
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    for name in ("results.json", "linearize.json", ".hidden", "old.bin", "model.onnx", "run.py"):
        (source / name).write_text("{}")
    folder.mkdir()
    copy_companions(source, folder, leave=(".py",))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    settings = {"generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert names == settings | {"additional_chat_templates/tools.jinja"}
    assert json.loads((folder / "tokenizer_config.json").read_text())
