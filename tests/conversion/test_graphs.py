"""Graphs of a forward pass: what onnxruntime and torch.export compute is what the model does, without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.conversion import run
from helpers.tiny import save_converted, tiny_model
from transformers import DynamicCache

from linearize.checkpoint.manifest import verify
from linearize.checkpoint.open import load
from linearize.conversion import graphs
from linearize.conversion.export import export
from linearize.errors import InputError
from linearize.generation import Chat, generate
from linearize.generation.graph import Choice, Graph, GraphChat
from linearize.model.modeling import linearize_

onnxruntime = pytest.importorskip("onnxruntime")
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": bool}
MIXER = {"name": "gla", "window": 8, "sinks": 2}
PROMPT = "Anna brought the boat to the mill, and the miller said the river would rise."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_converted(tmp_path_factory.mktemp("graphs") / "converted", MIXER)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    return export(folder, "onnx", tmp_path_factory.mktemp("graphs") / "onnx", piece=8)


@pytest.mark.slow
def test_pieces_and_steps_are_the_model(folder: Path, exported: Path) -> None:
    model, _ = load(folder, device="cpu")
    graph, ids = Graph(exported), torch.randint(4, 300, (3, 29))
    logits, state = graph.read(ids.numpy(), graph.empty(3))  # three pieces and five steps, three rows
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
    assert np.allclose(logits, expected, atol=1e-5)
    assert sum(x.numpy().nbytes for x in state.values()) == sum(x.numpy().nbytes for x in graph.empty(3).values())


@pytest.mark.parametrize(("module", "name"), list(graphs.STABLE), ids=lambda x: x if isinstance(x, str) else "")
def test_functions_that_are_traced_keep_their_digits(module: Any, name: str) -> None:
    x = torch.cat([-torch.logspace(-7, 2.3, 60), torch.logspace(-7, 1.9, 60)])
    x = x[x > -1] if name == "log1p" else x
    ours, exact = graphs.STABLE[module, name](x), getattr(module, name)(x.double())
    assert ((ours - exact).abs() <= 2e-6 * exact.abs() + 1e-7).all()


@pytest.mark.slow
def test_keys_that_close_a_gate_forget_no_more_than_in_the_model(tmp_path: Path) -> None:
    """onnxruntime's σ(−19) is 0, and its logarithm made a graph forget everything."""
    model = tiny_model("llama", layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=64, hidden_size=128)
    linearize_(model, MIXER)
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.data[0] *= 1000  # one channel of one head
    graphs.onnx(graphs.Piece(model.eval()), 1, tmp_path / "step.onnx", None, {})
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    state = {x.name: np.zeros([1, *x.shape[1:]], NUMPY[x.type]) for x in session.get_inputs() if x.name != "input_ids"}
    names, ids = [x.name for x in session.get_outputs()], torch.randint(4, 300, (1, 24))
    for token in ids.T:
        made = dict(zip(names, session.run(names, {"input_ids": token[:, None].numpy(), **state}), strict=True))
        state = {name: made[name.replace("input.", "output.", 1)] for name in state}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    layer: Any = cache.layers[0]
    for name, expected in layer.tensors.items():
        assert np.allclose(state[f"input.state.0.{name}"], expected, rtol=1e-4, atol=1e-4), name


@pytest.mark.slow
def test_text_is_that_of_the_folder_it_was_exported_from(folder: Path, exported: Path) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0}
    ours, theirs = (generate(each, PROMPT, **settings) for each in (exported, folder))
    assert (ours.texts, ours.new_tokens, ours.prompt_tokens) == (theirs.texts, theirs.new_tokens, theirs.prompt_tokens)
    several = generate(exported, [PROMPT, "A"], raw=True, **settings)
    assert several.texts == [generate(folder, each, raw=True, **settings).texts[0] for each in (PROMPT, "A")]


@pytest.mark.slow
def test_a_chat_reads_only_what_is_new(folder: Path, exported: Path) -> None:
    talks = GraphChat(Graph(exported), max_new_tokens=12, temperature=0), None
    model, tokenizer = load(folder, device="cpu")
    theirs = Chat(model, tokenizer, max_new_tokens=12, temperature=0)
    for line in ("Who brought the boat?", "And the river?"):
        ours, expected = talks[0].say(line), theirs.say(line)
        assert (ours.texts, ours.prompt_tokens) == (expected.texts, expected.prompt_tokens)
    assert talks[0].messages == theirs.messages


@pytest.mark.slow
def test_torch_is_not_imported(exported: Path) -> None:
    code = (
        "import sys; from linearize.cli import main; sys.argv = sys.argv[1:]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'"
    )
    command = [sys.executable, "-c", code, "linearize", "generate", str(exported), "--temperature", "0"]
    done = subprocess.run([*command, "--prompt", PROMPT, "--max-new-tokens", "5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = generate(exported, PROMPT, max_new_tokens=5, temperature=0).texts[0]
    assert done.stdout.strip() == said.strip()
    done = subprocess.run(command, input="Who?\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("> "), done.stderr


@pytest.mark.slow
def test_two_graphs_share_their_weights_and_are_recorded(folder: Path, exported: Path) -> None:
    weights = (folder / "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in exported.glob("*.data")) < 1.5 * weights
    assert verify(exported) == []


@pytest.mark.slow
def test_int8_weights_are_smaller_and_near(folder: Path, exported: Path, tmp_path: Path) -> None:
    small = export(folder, "onnx", tmp_path / "int8", piece=8, quantize="int8")
    sizes = [sum(file.stat().st_size for file in each.glob("*.data")) for each in (small, exported)]
    assert sizes[0] < 0.5 * sizes[1]
    ids = np.arange(4, 30)[None]
    ours, theirs = (graph.read(ids, graph.empty())[0] for graph in map(Graph, (small, exported)))
    assert 0 < np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own compiler
def test_a_program_of_torch_export_runs_without_this_package(folder: Path, tmp_path: Path) -> None:
    out = export(folder, "pt2", tmp_path / "pt2", piece=8)
    model, _ = load(folder, device="cpu")
    facts = json.loads((out / "graph.json").read_text())
    state = {n: torch.zeros(1, *x["shape"], dtype=getattr(torch, x["dtype"])) for n, x in facts["state"].items()}
    ids = torch.randint(4, 300, (1, 9))
    step, prefill = (torch.export.load(str(out / f"{name}.pt2")).module() for name in ("step", "prefill"))
    with torch.no_grad():
        state = prefill(input_ids=ids[:, :8], state=state)["state"]
        got, expected = step(input_ids=ids[:, 8:], state=state)["logits"], model(ids, use_cache=False).logits[:, -1]
    assert torch.allclose(got, expected, atol=1e-5)
    with pytest.raises(InputError, match="of the kind 'pt2'"):
        generate(out, PROMPT)
    if shutil.which("g++"):
        program = torch.export.load(str(out / "step.pt2"))
        compiled = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.aoti.pt2"))
        with torch.no_grad():
            got = torch._inductor.aoti_load_package(compiled)(input_ids=ids[:, 8:], state=state)["logits"]
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_a_source_s_step_takes_a_cache_of_any_length(tmp_path: Path) -> None:
    """Of heads such that no order of sizes is evident: 3 of 64 channels, as SmolLM2-135M has."""
    model = tiny_model("llama", layers=1, num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=576)
    graphs.onnx(graphs.Piece(model), 1, tmp_path / "step.onnx", None, {})
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    names, ids = [entry.name for entry in session.get_outputs()], torch.randint(4, 300, (1, 12))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        feed = {f"input.state.0.{part}": getattr(cache.layers[0], part).numpy().copy() for part in ("keys", "values")}
        for token in ids[:, 8:].split(1, 1):
            made = dict(zip(names, session.run(names, {**feed, "input_ids": token.numpy()}), strict=True))
            feed = {name: made[name.replace("input.", "output.", 1)] for name in feed}
            expected = model(token, past_key_values=cache).logits[:, -1]
            logits = made[next(name for name in names if "logits" in name)]
            assert np.allclose(logits, expected, atol=1e-4)  # fp32, sums of 576 products


@pytest.mark.slow
def test_clusters_merge_in_a_graph_and_rounded_ones_are_refused_or_kept_unrounded(tmp_path: Path) -> None:
    mixer = {**MIXER, "name": "clusters", "clusters": 16, "chunk": 4}
    rounded = save_converted(tmp_path / "rounded", {**mixer, "state_dtype": "int8"})
    with pytest.raises(InputError, match="kept in int8, .* pass --state-dtype float32"):
        export(rounded, "onnx", tmp_path / "onnx")
    with pytest.raises(InputError, match="only float32 is known"):
        export(rounded, "onnx", tmp_path / "onnx", state_dtype="bfloat16")
    out = export(rounded, "onnx", tmp_path / "onnx", piece=8, state_dtype="float32")
    plain = save_converted(tmp_path / "plain", mixer)
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0}
    assert generate(out, PROMPT, **settings).texts == generate(plain, PROMPT, **settings).texts


def test_what_a_graph_cannot_be_is_refused(llama_folder: Path, folder: Path, tmp_path: Path) -> None:
    hybrid = run(llama_folder, tmp_path / "hybrid", mixer=MIXER, layers=[0, 2])
    penalised = Path(shutil.copytree(folder, tmp_path / "penalised"))
    (penalised / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 2}))
    for source, options, text in (
        (hybrid, {}, "layers 1, .* keep softmax attention"),
        (penalised, {}, "asks for no_repeat_ngram_size"),
        (folder, {"to": "openvino"}, "take onnx"),
        (folder, {"piece": 1}, "piece: found 1"),
        (folder, {"quantize": "int4"}, "only int8"),
        (folder, {"to": "pt2", "quantize": "int8"}, "only int8"),
        (folder, {"link": True}, "weights of its own"),
    ):
        with pytest.raises(InputError, match=text):
            export(source, **{"to": "onnx", "out": tmp_path / "none", **options})
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_what_a_graph_does_not_do_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lossless, save_state: a graph has no such thing"):
        generate(exported, PROMPT, lossless=True, save_state=tmp_path / "state")
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    (broken / "step.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be opened by onnxruntime"):
        generate(broken, PROMPT)
    (broken / "graph.json").write_text("{}")
    with pytest.raises(InputError, match="export the model again"):
        generate(broken, PROMPT)


def test_samples_follow_the_settings() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def drawn(**settings: Any) -> set[int]:
        choose = Choice({"do_sample": True, **settings}, 0)
        return {choose(logits, []) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == drawn(top_p=0.7) == drawn(min_p=0.5) == {0, 1}
    assert drawn(temperature=0.01) == {0}
    assert Choice({"repetition_penalty": 2.0}, None)(-logits, [3]) == 2
    assert [Choice({"do_sample": True}, 5)(logits, []) for _ in range(2)] == [
        Choice({"do_sample": True}, 5)(logits, [])
    ] * 2
