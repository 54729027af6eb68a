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
import yaml
from gguf import GGUFWriter
from helpers.fakehub import TOKEN, FakeHub, Repo
from helpers.tiny import tiny_model, tiny_tokenizer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.checkpoint.copying import fingerprint
from linearize.checkpoint.identity import identity
from linearize.checkpoint.manifest import verify, write_manifest
from linearize.errors import InputError
from linearize.hub.names import without_path
from linearize.hub.push import card, plan, push
from linearize.model.modeling import linearize_

MIXER = {"name": "gla", "combine": "memory", "window": 8, "sinks": 2}
SCORE = {"metric": "acc_norm", "stderr": 0.02, "n": 100, "higher_is_better": True}
TEXT = {
    "text": "wiki",
    "length": 65,
    "blocks": 1,
    "tokens": 64,
    "by_position": [{"start": 0, "end": 64, "ppl": 20.0, "tokens": 64}],
}
RESULTS = {
    "schema": 1,
    "model": "student",
    "source": "acme/tiny-llama",
    "suite": "smoke",
    "columns": {
        name: {
            "tasks": {"arc_easy": SCORE | {"value": value}},
            "perplexity": (text := TEXT | {"value": perplexity}) | {"texts": [text]},
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


CLIENT = """
import json, os, sys
from linearize.errors import InputError
from linearize.hub.push import push
for line in sys.stdin:
    login, asked = json.loads(line)
    os.environ["HF_TOKEN"] = login or ""
    try:
        answer = push(**asked)
    except InputError as error:
        answer = f"InputError: {error}"
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that pushes. A process of its own, because HF_ENDPOINT is read when huggingface_hub is imported."""

    def __init__(self, environ: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def push(self, folder: Path, repo: str, login: str | None = TOKEN, **options) -> str:
        """What ``linearize.hub.push`` returns, or the paragraph of its InputError."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([login, {"folder": str(folder), "repo": repo, **options}]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate(timeout=60)


def environ(hub: FakeHub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    return os.environ | hub.environ(home, token) | {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    with FakeHub() as hub, Client(environ(hub, tmp_path_factory.mktemp("home"))) as client:
        yield hub, client


@pytest.fixture
def hub(served) -> FakeHub:
    """An empty Hub."""
    server = served[0]
    server.repos, server.uploads, server.requests, server.corrupt_uploads = {}, {}, [], False
    return server


@pytest.fixture
def client(served) -> Client:
    return served[1]


def load(code: str, hub: FakeHub, home: Path, *arguments: str) -> str:
    """Output of code that runs where nobody is logged in and nothing is cached."""
    environment = environ(hub, home, token=None)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pushed_folder_loads_back_bit_for_bit(folder: Path, hub: FakeHub, client: Client, tmp_path: Path):
    before = contents(folder)
    assert client.push(folder, "acme/tiny-gla", message="first") == f"{hub.url}/acme/tiny-gla"
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
    load(code, hub, tmp_path / "reader")
    back = load_file(tmp_path / "back")
    local = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(back.pop("logits"), local(ids).logits)
    assert back.pop("text").tolist() == tiny_tokenizer()("The river rose").input_ids
    expected = local.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_a_second_push_replaces_shards_of_the_first(tmp_path: Path, hub: FakeHub, client: Client):
    sharded = write_folder(tmp_path / "sharded", max_shard_size="100KB")
    shards = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert client.push(sharded, "acme/gla") == f"{hub.url}/acme/gla"
    assert shards < set(hub.repos["acme/gla"].files)
    whole = write_folder(tmp_path / "whole")
    assert client.push(whole, "acme/gla") == f"{hub.url}/acme/gla"
    assert {name for name in hub.repos["acme/gla"].files if "safetensors" in name} == {"model.safetensors"}


def test_private_and_a_name_without_organisation(folder: Path, hub: FakeHub, client: Client, tmp_path: Path):
    assert client.push(folder, "tiny-gla", private=True) == f"{hub.url}/tester/tiny-gla"
    assert hub.repos["tester/tiny-gla"].private


@pytest.mark.slow
def test_an_adapter_goes_up_alone_when_its_base_is_on_the_hub(tmp_path: Path, hub: FakeHub, client: Client):
    assert hub.url in client.push(write_folder(tmp_path / "base"), "acme/base")
    adapter = write_adapter(tmp_path / "adapter", "acme/base")
    assert hub.url in client.push(adapter, "acme/adapter")
    metadata = ModelCard(hub.repos["acme/adapter"].files["README.md"].decode()).data
    assert (metadata.base_model, metadata.base_model_relation) == ("acme/base", "adapter")
    code = (
        "import linearize; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('acme/adapter')\n"
        "print(sum('lora' in name for name, _ in model.named_parameters()))"
    )
    assert load(code, hub, tmp_path / "reader") == "4"  # A and B of q_proj in two layers


def test_an_adapter_whose_base_is_on_the_hub_runs_and_is_described(tmp_path: Path, hub: FakeHub, client: Client):
    assert hub.url in client.push(write_folder(tmp_path / "base"), "acme/base")
    assert hub.url in client.push(write_adapter(tmp_path / "adapter", "acme/base"), "acme/adapter")
    code = (
        "import sys, torch\n"
        "from linearize.checkpoint.describe import inspect\n"
        "from linearize.checkpoint.open import base_folder, load, open_config\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "assert open_config('acme/adapter').model_type == 'linearized'\n"
        "logits = [load(name)[0](torch.arange(40)[None]).logits for name in sys.argv[1:3]]\n"
        "assert torch.equal(*logits)\n"
        "save_file({'logits': logits[0]}, sys.argv[3])\n"
        "assert (base_folder(Path(sys.argv[1])) / 'model.safetensors').is_file()\n"
        "print(inspect(sys.argv[1])['adapter']['parameters'])"
    )
    arguments = [str(tmp_path / "adapter"), "acme/adapter", str(tmp_path / "logits")]
    assert load(code, hub, tmp_path / "reader", *arguments) == "448"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        assert not torch.equal(load_file(tmp_path / "logits")["logits"], plain(torch.arange(40)[None]).logits)


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
def test_the_hub_says_no(
    repo, token, message, folder: Path, llama_folder: Path, hub: FakeHub, client: Client, tmp_path: Path
):
    config = (llama_folder / "config.json").read_bytes()
    hub.repos["acme/taken"] = Repo("acme/taken", private=False, files={"config.json": config})
    answer = client.push(folder, repo, login=token)
    assert re.fullmatch(rf"InputError: --repo {repo}: .*{message}.*", answer), answer
    assert set(hub.repos) == {"acme/taken"} and set(hub.repos["acme/taken"].files) == {"config.json"}


def test_private_never_ends_up_in_a_public_repository(folder: Path, hub: FakeHub, client: Client, tmp_path: Path):
    hub.repos["acme/open"] = Repo("acme/open", private=False)
    answer = client.push(folder, "acme/open", private=True)
    assert "exists and is public" in answer
    assert not hub.repos["acme/open"].files


def test_damage_on_the_way_is_noticed(folder: Path, hub: FakeHub, client: Client, tmp_path: Path):
    hub.corrupt_uploads = True
    answer = client.push(folder, "acme/x")
    assert re.fullmatch(r"InputError: .*refused the upload.*SHA-256.*", answer), answer
    assert not hub.repos["acme/x"].files


@pytest.mark.slow
def test_no_network_and_no_connection(folder: Path, hub: FakeHub, client: Client, tmp_path: Path):
    with Client(environ(hub, tmp_path) | {"HF_HUB_OFFLINE": "1"}) as offline:
        assert "HF_HUB_OFFLINE is set" in offline.push(folder, "acme/x")
    with FakeHub() as gone:
        environment = environ(gone, tmp_path)
    with Client(environment) as alone:
        answer = alone.push(folder, "acme/x")
    assert re.fullmatch(r"InputError: --repo acme/x: the Hub cannot be reached .*", answer), answer


def test_metadata_that_the_hub_does_not_accept(folder: Path, hub: FakeHub, client: Client, tmp_path: Path):
    (folder / "README.md").write_text("---\nlicense: other\n---\nMine.\n")
    answer = client.push(folder, "acme/x")
    assert re.fullmatch(r'InputError: .*refused the upload.*"license_name" is required.*', answer), answer
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
        (remove("config.json"), "config.json: is missing or holds no JSON"),
        (write("config.json", "{"), "config.json: is missing or holds no JSON"),
        (write("config.json", "[]"), "found a list"),
        (write("config.json", '{"model_type": "llama"}'), "model_type is 'llama'.*linearize convert --model"),
        (write("config.json", '{"model_type": "linearized"}'), "only linearized folders"),
        (remove("model.safetensors"), "model.safetensors is missing"),
        (truncate, "model.safetensors: is not a whole safetensors file"),
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


def test_a_dry_run_lists_files_and_card_and_touches_nothing(folder: Path, hub: FakeHub, client: Client, tmp_path: Path):
    before = contents(folder)
    listing = client.push(folder, "acme/x", login=None, dry_run=True)
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
    values = data.to_dict()
    assert (values["library_name"], values["pipeline_tag"]) == ("transformers", "text-generation")
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
    (folder / "model.safetensors.partial").unlink()
    write_manifest(folder, {"source": {"path": str(source)}}, {})
    upload = plan(folder, "acme/x")
    written = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in upload.files.items()}
    assert json.loads(written["config.json"])["linearize"]["source"]["path"] == "source"
    assert not any(str(tmp_path).encode() in content for content in written.values())
    published = tmp_path / "published"
    published.mkdir()
    for name, content in written.items():
        (published / name).write_bytes(content)
    assert verify(published) == []


def test_names_are_published_and_never_paths(tmp_path: Path):
    """A source at /models must not turn the entry /models of a vocabulary into a second `models`."""
    home = tmp_path / "home" / "models"
    folder = write_folder(tmp_path / "x", {"id": "models", "path": str(home)})
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {str(home): 900, "models": 901}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary, indent=2))
    data = [{"path": str(tmp_path / "home" / "diary.jsonl")}, {"path": "acme/text"}, {"path": "demo-text"}]
    recipe = {"source": {"id": str(home)}, "data": data, "eval": {"suite": str(home / "mine.yaml")}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    results = RESULTS | {"model": str(tmp_path / "runs" / "x"), "other": {"model": str(tmp_path / "runs" / "y")}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "report.html").write_text(str(tmp_path))
    (folder / "model.safetensors.partial").unlink()
    facts = {"source": {"path": str(home)}, "training": {"model": str(tmp_path / "runs" / "0"), "data": data}}
    write_manifest(folder, facts | {"calibration": {"data": data}, "selection": {"data": data}}, {})
    upload = plan(folder, "acme/x")
    written = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in upload.files.items()}
    tokenizer = written.pop("tokenizer.json")
    assert tokenizer == (folder / "tokenizer.json").read_bytes() and str(home).encode() in tokenizer
    assert [name for name, content in written.items() if str(tmp_path).encode() in content] == []
    named = [entry["path"] for entry in yaml.safe_load(written["recipe.yaml"])["data"]]
    assert named == ["diary.jsonl", "acme/text", "demo-text"]
    assert yaml.safe_load(written["recipe.yaml"])["eval"]["suite"] == "mine.yaml"
    manifest = json.loads(written["linearize.json"])
    assert (manifest["training"]["model"], manifest["selection"]["data"][0]["path"]) == ("0", "diary.jsonl")
    assert json.loads(written["results.json"])["model"] == "x"
    assert (folder / "recipe.yaml").read_text() == json.dumps(recipe)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("C:\\Users\\me\\model", "model"),
        ("../model/", "model"),
        ("~/data/*.jsonl", "*.jsonl"),
        ("acme/x", "acme/x"),
        ("/", "/"),
    ],
)
def test_the_name_of_a_path(path: str, name: str):
    assert without_path(path) == name


@pytest.mark.parametrize(("kind", "layers"), [("gpt2", {"n_layer": 3}), ("llama", {"num_hidden_layers": 3})])
def test_the_card_counts_layers_under_any_name(kind: str, layers: dict, tmp_path: Path):
    config = AutoConfig.for_model(kind, vocab_size=384, hidden_size=16, num_attention_heads=2, **layers)
    model = linearize_(AutoModelForCausalLM.from_config(config), MIXER, source={"id": f"acme/{kind}"})
    model.save_pretrained(tmp_path / kind)
    tiny_tokenizer().save_pretrained(tmp_path / kind)
    assert "in 3 of its 3 layers" in card(tmp_path / kind)


def test_licence_of_a_gguf_file(tmp_path: Path):
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    source = {"id": "tiny", "path": str(tmp_path), "gguf": "tiny.gguf"}
    assert ModelCard(card(write_folder(tmp_path / "x", source))).data.license == "apache-2.0"


def test_results_of_the_run_beside_the_folder_and_of_other_weights(tmp_path: Path):
    folder = write_folder(tmp_path / "run" / "merged")
    results, beside = RESULTS | {"settings": {"weights": fingerprint(folder, lambda count: None)}}, tmp_path / "run"
    (beside / "results.json").write_text(json.dumps(results))
    upload = plan(folder)
    assert upload.evaluated and "results.json" in upload.files and "47.0" in upload.card
    (beside / "results.json").write_text("not ours")
    assert not plan(folder).evaluated
    (beside / "results.json").write_text(json.dumps(RESULTS | {"settings": {"weights": "0" * 64}}))
    assert not plan(folder).evaluated
    shutil.move(beside / "results.json", folder)
    with pytest.raises(InputError, match="measured on other weights.*linearize eval"):
        plan(folder)


def test_results_with_another_tokenizer(tmp_path: Path):
    folder = write_folder(tmp_path / "merged")
    known = identity(folder)
    settings = {"weights": known["weights"], "tokenizer": known["tokenizer"]}
    (folder / "results.json").write_text(json.dumps(RESULTS | {"settings": settings}))
    assert plan(folder).evaluated
    (folder / "results.json").write_text(json.dumps(RESULTS | {"settings": settings | {"tokenizer": "0" * 64}}))
    with pytest.raises(InputError, match="or with another tokenizer; run `linearize eval"):
        plan(folder)


def test_a_card_written_by_hand_is_kept_and_a_generated_one_is_not(folder: Path):
    (folder / "README.md").write_text(card(folder).replace("# tiny-gla", "# changed"))
    assert "# changed" not in card(folder)
    (folder / "README.md").write_text("Mine.")
    assert card(folder) == "Mine."
    (folder / "README.md").write_text("# Model Card for Model ID\n[More Information Needed]")
    assert "# tiny-gla" in card(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.yaml", "a: ["),
        ("recipe.yaml", "\udcff"),
        ("linearize.json", "[1"),
        ("linearize.json", "[1]"),
        ("linearize.json", "{}"),
        ("model.safetensors.index.json", '{"weight_map": 5}'),
        ("config.json", '{"model_type": "linearized", "linearize": {"layers": ["x"], "source": {}}}'),
    ],
)
def test_a_damaged_file_is_one_paragraph(name: str, content: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(Path(__file__).parents[1] / "regression" / "calibrated", folder)
    (folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=f"{folder}|{name}.*; write the folder again"):
        plan(folder, "me/model")
