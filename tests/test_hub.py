"""Model card and upload, over real HTTP against a Hub on loopback; clients run in processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from fakehub import TOKEN, FakeHub, Repo
from gguf import GGUFWriter
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from linearize.errors import InputError
from linearize.hub import card, plan, push
from linearize.modeling import linearize_

MIXER = {"name": "gla", "combine": "memory", "window": 8, "sinks": 2}
SCORE = {"metric": "acc_norm", "stderr": 0.02, "n": 100, "higher_is_better": True}
RESULTS = {
    "schema": 1,
    "model": "student",
    "source": "acme/tiny-llama",
    "suite": "smoke",
    "columns": {
        name: {
            "tasks": {"arc_easy": SCORE | {"value": value}},
            "perplexity": {
                "value": perplexity,
                "tokens": 64,
                "by_position": [{"start": 0, "end": 64, "ppl": perplexity, "tokens": 64}],
            },
            "seconds": 1.0,
        }
        for name, value, perplexity in [("source", 0.51, 11.25), ("window", 0.41, 31.5), ("student", 0.47, 17.75)]
    },
    "environment": {"commit": "0123abc", "seed": 0},
}


def write_folder(folder: Path, source: dict | None = None, results: dict | None = None, **save) -> Path:
    """A linearized folder as a converted or merged model leaves it, with things in it that must not be uploaded."""
    model = linearize_(tiny_model(layers=2), MIXER, source=source or {"id": "acme/tiny-llama"})
    model.save_pretrained(folder, **save)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "recipe.yaml").write_text("description: a test\nconvert: {mixer: {name: gla}}\n")
    if results:
        (folder / "results.json").write_text(json.dumps(results))
    for name in ("checkpoint-20/optimizer.bin", "tb/events.out", ".env", "model.safetensors.partial"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny-gla", results=RESULTS)


@pytest.fixture
def hub():
    with FakeHub() as server:
        yield server


def python(code: str, hub: FakeHub, home: Path, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    """Run code as a client of the hub, with nothing in its cache and no login but ``token``."""
    root = str(Path(__file__).parents[1])
    environ = os.environ | hub.environ(home, token) | {"PYTHONPATH": root}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)


def push_code(folder: Path, repo: str, **options) -> str:
    """A client that pushes; prints the address, or the paragraph of an InputError."""
    return (
        "from linearize.errors import InputError\n"
        "from linearize.hub import push\n"
        f"try: print(push({str(folder)!r}, {repo!r}, **{options!r}))\n"
        "except InputError as error: print('InputError:', error)\n"
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- there and back ----------------------------------------------------------------------------------------------------


def test_a_pushed_folder_loads_back_bit_for_bit(folder: Path, hub: FakeHub, tmp_path: Path):
    before = contents(folder)
    pushed = python(push_code(folder, "acme/tiny-gla", message="first"), hub, tmp_path / "writer")
    assert pushed.stdout.strip() == f"{hub.url}/acme/tiny-gla", pushed.stderr
    assert contents(folder) == before

    repo = hub.repos["acme/tiny-gla"]
    assert repo.messages[-1] == "first" and not repo.private
    assert set(repo.files) == set(plan(folder).files)
    assert "model.safetensors" in repo.lfs  # it went through the LFS batch and a PUT whose SHA-256 the server checked
    assert repo.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()

    ids = torch.arange(40)[None] % 300
    code = (
        "import linearize, torch\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('acme/tiny-gla').eval()\n"
        "assert type(model).__name__ == 'LinearizedForCausalLM', type(model)\n"
        "text = AutoTokenizer.from_pretrained('acme/tiny-gla')('The river rose').input_ids\n"
        "with torch.no_grad(): logits = model(torch.arange(40)[None] % 300).logits\n"
        "tensors = {k: v.clone() for k, v in model.state_dict().items()}\n"
        f"save_file(tensors | {{'logits': logits, 'text': torch.tensor(text)}}, {str(tmp_path / 'back')!r})\n"
    )
    loaded = python(code, hub, tmp_path / "reader", token=None)
    assert loaded.returncode == 0, loaded.stderr
    back = load_file(tmp_path / "back")
    local = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(back.pop("logits"), local(ids).logits)
    assert back.pop("text").tolist() == tiny_tokenizer()("The river rose").input_ids
    expected = local.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_a_second_push_replaces_shards_of_the_first(tmp_path: Path, hub: FakeHub):
    sharded = write_folder(tmp_path / "sharded", max_shard_size="100KB")
    shards = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert hub.url in python(push_code(sharded, "acme/gla"), hub, tmp_path / "a").stdout
    assert shards < set(hub.repos["acme/gla"].files)
    whole = write_folder(tmp_path / "whole")
    assert hub.url in python(push_code(whole, "acme/gla"), hub, tmp_path / "b").stdout
    assert {name for name in hub.repos["acme/gla"].files if "safetensors" in name} == {"model.safetensors"}


def test_private_and_a_name_without_organisation(folder: Path, hub: FakeHub, tmp_path: Path):
    pushed = python(push_code(folder, "tiny-gla", private=True), hub, tmp_path)
    assert pushed.stdout.strip() == f"{hub.url}/tester/tiny-gla", pushed.stderr
    assert hub.repos["tester/tiny-gla"].private


def test_an_adapter_goes_up_alone_when_its_base_is_on_the_hub(tmp_path: Path, hub: FakeHub):
    pushed = python(push_code(write_folder(tmp_path / "base"), "acme/base"), hub, tmp_path / "base-home")
    assert hub.url in pushed.stdout, pushed.stderr
    adapter = write_adapter(tmp_path / "adapter", "acme/base")
    assert hub.url in python(push_code(adapter, "acme/adapter"), hub, tmp_path / "home").stdout
    metadata = ModelCard(hub.repos["acme/adapter"].files["README.md"].decode()).data
    assert (metadata.base_model, metadata.base_model_relation) == ("acme/base", "adapter")
    code = (
        "import linearize; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('acme/adapter')\n"
        "print(sum('lora' in name for name, _ in model.named_parameters()))"
    )
    loaded = python(code, hub, tmp_path / "reader", token=None)
    assert loaded.stdout.strip() == "4", loaded.stderr  # A and B of q_proj in two layers


def write_adapter(folder: Path, base: str) -> Path:
    """A LoRA adapter on q_proj of a linearized base, with the README.md that peft leaves."""
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight": torch.ones(shape)
        for layer in range(2)
        for half, shape in (("A", (2, 48)), ("B", (64, 2)))
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    (folder / "README.md").write_text(
        "---\nlibrary_name: peft\n---\n# Model Card for Model ID\n[More Information Needed]\n"
    )
    tiny_tokenizer().save_pretrained(folder)
    return folder


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("acme/x", None, "not logged in.*hf auth login"),
        ("acme/x", "hf_wrong", "does not accept your token.*hf auth login"),
        ("stranger/x", TOKEN, "you may not write there.*the rights to create a model"),
        ("acme/taken", TOKEN, "holds a llama model.*choose another name"),
    ],
)
def test_the_hub_says_no(repo, token, message, folder: Path, llama_folder: Path, hub: FakeHub, tmp_path: Path):
    config = (llama_folder / "config.json").read_bytes()
    hub.repos["acme/taken"] = Repo("acme/taken", private=False, files={"config.json": config})
    answer = python(push_code(folder, repo), hub, tmp_path / "home", token).stdout
    assert re.fullmatch(rf"InputError: --repo {repo}: .*{message}.*\n", answer), answer
    assert set(hub.repos) == {"acme/taken"} and set(hub.repos["acme/taken"].files) == {"config.json"}


def test_private_never_ends_up_in_a_public_repository(folder: Path, hub: FakeHub, tmp_path: Path):
    hub.repos["acme/open"] = Repo("acme/open", private=False)
    answer = python(push_code(folder, "acme/open", private=True), hub, tmp_path).stdout
    assert "exists and is public" in answer
    assert not hub.repos["acme/open"].files


def test_damage_on_the_way_is_noticed(folder: Path, hub: FakeHub, tmp_path: Path):
    hub.corrupt_uploads = True
    answer = python(push_code(folder, "acme/x"), hub, tmp_path).stdout
    assert re.fullmatch(r"InputError: .*refused the upload.*SHA-256.*\n", answer), answer
    assert not hub.repos["acme/x"].files


def test_no_network_and_no_connection(folder: Path, hub: FakeHub, tmp_path: Path):
    offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n" + push_code(folder, "acme/x")
    assert "HF_HUB_OFFLINE is set" in python(offline, hub, tmp_path).stdout
    hub.__exit__()
    answer = python(push_code(folder, "acme/x"), hub, tmp_path).stdout
    assert re.fullmatch(r"InputError: --repo acme/x: the Hub cannot be reached .*\n", answer), answer


def test_metadata_that_the_hub_does_not_accept(folder: Path, hub: FakeHub, tmp_path: Path):
    (folder / "README.md").write_text("---\nlicense: other\n---\nMine.\n")
    answer = python(push_code(folder, "acme/x"), hub, tmp_path).stdout
    assert re.fullmatch(r'InputError: .*refused the upload.*"license_name" is required.*\n', answer), answer
    assert not hub.repos["acme/x"].files


@pytest.mark.parametrize("repo", ["a/b/c", "acme/with space", "acme/-x", ""])
def test_malformed_repository_names(repo: str, folder: Path):
    with pytest.raises(InputError, match="not the name of a repository"):
        push(folder, repo)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "has no config.json"),
        (write("config.json", "{"), "config.json: not valid JSON"),
        (write("config.json", "[]"), "holds a list"),
        (write("config.json", '{"model_type": "llama"}'), "model_type is 'llama'.*linearize convert --model"),
        (write("config.json", '{"model_type": "linearized"}'), "only linearized folders"),
        (remove("model.safetensors"), "model.safetensors is missing"),
        (truncate, "model.safetensors: not a whole safetensors file"),
        (write("model.safetensors.index.json", '{"weight_map": {"a": "model-7.safetensors"}}'), "model-7.* is missing"),
        (remove("tokenizer_config.json"), "has no tokenizer_config.json"),
        (write("results.json", '{"schema": 99}'), "results.json: schema is 99"),
        (lambda folder: write_adapter(folder / "adapter", str(folder)), None),
    ],
)
def test_incomplete_folders(damage, message: str | None, folder: Path):
    damage(folder)
    if message is None:
        folder, message = folder / "adapter", "which others cannot open.*linearize merge"
    with pytest.raises(InputError, match=message):
        push(folder, "acme/x", dry_run=True)


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        push(tmp_path / "nothing", "acme/x")


# -- dry run and card --------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_files_and_card_and_touches_nothing(folder: Path, hub: FakeHub, tmp_path: Path):
    before = contents(folder)
    listing = python(push_code(folder, "acme/x", dry_run=True), hub, tmp_path, token=None).stdout
    assert contents(folder) == before
    assert not [request for request in hub.requests if not request.startswith("GET ")] and not hub.repos
    listed = re.findall(r"^ +\S+ \S+  (\S+)$", listing, re.MULTILINE)
    assert {"README.md", "config.json", "model.safetensors", "recipe.yaml", "results.json", "tokenizer.json"} < set(
        listed
    )
    assert not any("checkpoint" in name or name.startswith((".", "tb/")) or "partial" in name for name in listed)
    assert "nothing was uploaded" in listing and card(folder, "acme/x").strip() in listing
    size = (folder / "model.safetensors").stat().st_size
    assert plan(folder).to_dict()["files"]["model.safetensors"] == size


def test_card_of_an_evaluated_model(folder: Path):
    text = card(folder, "acme/tiny-gla")
    data = ModelCard(text).data
    assert data.base_model == "acme/tiny-llama" and data.base_model_relation == "finetune"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"linearize", "gla"} <= set(data.tags)
    scores = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert scores == {("arc_easy", "acc_norm"): 0.47, ("smoke text", "perplexity"): 17.75}
    assert all(shown in text for shown in ("47.0", "51.0", "41.0", "17.75", "**window**", "| 2 | gla |"))
    assert 'from_pretrained("acme/tiny-gla")' in text and "convert: {mixer: {name: gla}}" in text
    assert "not evaluated" not in text


def test_card_without_results_says_so(tmp_path: Path):
    upload = plan(write_folder(tmp_path / "x"))
    assert "**not evaluated**" in upload.card and not upload.evaluated
    assert ModelCard(upload.card).data.eval_results is None
    assert "licence of the source is not known" in upload.card


def test_licence_comes_from_the_source_and_its_path_stays_here(llama_folder: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(llama_folder, source)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: river\nlanguage: en\n---\n# Source\n")
    folder = write_folder(tmp_path / "x", {"id": "source", "path": str(source)})
    upload = plan(folder, "acme/x")
    metadata = ModelCard(upload.card).data.to_dict()
    assert (metadata["license"], metadata["license_name"], metadata["language"]) == ("other", "river", "en")
    assert "Inherited from the source: `other`" in upload.card
    assert "base_model" not in metadata  # a folder's name is no id of the Hub
    published = json.loads(upload.files["config.json"])
    assert published["linearize"]["source"]["path"] is None
    assert not any(str(tmp_path).encode() in content for content in upload.files.values() if isinstance(content, bytes))


def test_licence_of_a_gguf_file(tmp_path: Path):
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    source = {"id": "tiny", "path": str(tmp_path), "gguf": "tiny.gguf"}
    assert ModelCard(card(write_folder(tmp_path / "x", source))).data.license == "apache-2.0"


def test_a_card_written_by_hand_is_kept_and_a_generated_one_is_not(folder: Path):
    (folder / "README.md").write_text(card(folder).replace("# tiny-gla", "# changed"))
    assert "# changed" not in card(folder)
    (folder / "README.md").write_text("Mine.")
    assert card(folder) == "Mine."
    (folder / "README.md").write_text("# Model Card for Model ID\n[More Information Needed]")
    assert "# tiny-gla" in card(folder)
