"""States that are saved, kept and joined: whoever goes on from one goes on as if nothing had been between."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.states import CASES, W, go_on, model_of, read, text
from helpers.tiny import MIXER, save_converted, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import linearize
from linearize import verbs
from linearize.checkpoint import states as files
from linearize.checkpoint.open import load
from linearize.cli import main
from linearize.errors import InputError
from linearize.generation import Chat, Lossless, StateStore, chat, generate
from linearize.model.branches import windows
from linearize.model.mixers import MIXERS
from linearize.model.modeling import linearize_
from linearize.model.states import copied, split_states, stack_states

ROOT = Path(__file__).parents[2]


# --- saved, and opened elsewhere


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For each case the logits of a text that is read on without a stop, and of one read on in another process."""
    folder, here = tmp_path_factory.mktemp("states"), {}
    for number, (name, case) in enumerate(CASES.items()):
        model = model_of(**case)
        cache, tokens = read(model, **case)
        linearize.save_state(cache, tokens, model, folder / f"{number}.safetensors")
        here[name] = go_on(model, cache)
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-m", "helpers.states", str(folder)], check=True, env=environ)
    answers = torch.load(folder / "answers.pt")
    return here, {name: answers[number] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_a_state_opened_in_another_process_goes_on_bit_for_bit(name: str, elsewhere) -> None:
    here, there = elsewhere
    assert torch.equal(here[name], there[name])


@pytest.fixture(scope="module")
def gla() -> Any:
    return model_of("gla")


@pytest.fixture
def file(gla: Any, tmp_path: Path) -> Path:
    return linearize.save_state(*read(gla), gla, tmp_path / "new" / "state.safetensors")


def test_what_is_saved_shares_no_memory_and_says_all_tokens(gla: Any, file: Path) -> None:
    cache, tokens = linearize.load_state(file, gla)
    again, _ = linearize.load_state(file, gla)
    first = go_on(gla, cache)
    assert torch.equal(tokens, text(45)[0]) and torch.equal(first, go_on(gla, again))
    assert not list(file.parent.glob(".*")) and not list(file.parent.glob("*.tmp"))


def test_the_last_token_may_be_unread(gla: Any, tmp_path: Path) -> None:
    output = gla.generate(text(20), max_new_tokens=5, return_dict_in_generate=True, eos_token_id=None, pad_token_id=2)
    linearize.save_state(output.past_key_values, output.sequences, gla, tmp_path / "state")
    cache, tokens = linearize.load_state(tmp_path / "state", gla)
    assert len(tokens) == 25 and cache.get_seq_length() == 24


# --- refused


def header_of(file: Path) -> tuple[dict, dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["linearize_state"]), load_file(file)


def written_anew(file: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    said, own = header_of(file)
    own = own if tensors is None else tensors
    said |= {"sha256": files._checksum(own), **changes}
    save_file(own, file, {"linearize_state": json.dumps(said)})


def layers_of(file: Path, **changes: Any) -> list[dict]:
    said, _ = header_of(file)
    return [{**said["cache"][0], **changes}, *said["cache"][1:]]


def other_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def without(file: Path, name: str) -> dict[str, Tensor]:
    return {key: x for key, x in load_file(file).items() if key != name}


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-50]), "cut short"),
    "half a header": (lambda f: f.write_bytes(f.read_bytes()[:40]), "not a whole safetensors file"),
    "empty": (lambda f: f.write_bytes(b""), "not a whole safetensors file"),
    "text": (lambda f: f.write_text("hello, I am no state"), "not a whole safetensors file"),
    "a byte": (other_byte, "sha256 differs"),
    "foreign": (lambda f: save_file({"weight": torch.ones(2)}, f), "no saved state"),
    "newer": (lambda f: written_anew(f, format=2), "of format 2; this version reads up to 1; upgrade"),
    "no format": (lambda f: written_anew(f, format=None), "holds no state that can be read"),
    "no json": (lambda f: save_file({"x": torch.ones(2)}, f, {"linearize_state": "{"}), "holds no state"),
    "a list": (lambda f: save_file({"x": torch.ones(2)}, f, {"linearize_state": "[]"}), "holds no state"),
    "no tokens": (lambda f: written_anew(f, without(f, "tokens")), "holds no state"),
    "no keys": (lambda f: written_anew(f, without(f, "1.keys")), "lacks keys and values"),
    "fewer keys": (
        lambda f: written_anew(f, load_file(f) | {f"1.{n}": torch.ones(1, 2, 9, 16) for n in ("keys", "values")}),
        "layer 1 has keys of 9 tokens, of 45",
    ),
    "no state": (lambda f: written_anew(f, without(f, "0.tensors.state_0")), "holds no state|tensors of other shapes"),
    "other shapes": (
        lambda f: written_anew(f, load_file(f) | {"0.tensors.state_0": torch.ones(1, 2, 3)}), "other shapes"
    ),
    "other tokens": (lambda f: written_anew(f, load_file(f) | {"tokens": torch.ones(7).long()}), "45 tokens, but 7"),
    "a count": (lambda f: written_anew(f, load_file(f) | {"0.tensors.count": torch.tensor([44])}), "44 tokens in 45"),
    "a foreign kind": (lambda f: written_anew(f, cache=layers_of(f, kind="Popen")), "holds no state"),
    "a method": (lambda f: written_anew(f, cache=layers_of(f, crop=1)), "has no crop"),
    "a window": (lambda f: written_anew(f, cache=layers_of(f, window=4)), "has window 4"),
    "layers": (lambda f: written_anew(f, cache=layers_of(f) * 9), "holds no state"),
    "a text": (lambda f: written_anew(f, cache=layers_of(f, _length="45")), "holds no state|not what the model"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_one_paragraph(what: str, gla: Any, file: Path) -> None:
    damage, said = DAMAGE[what]
    damage(file)
    with pytest.raises(InputError, match=said) as raised:
        linearize.load_state(file, gla)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["absent", "."])
def test_no_file(name: str, gla: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        linearize.load_state(tmp_path / name, gla)


def nudged(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.001
    return model


def adapted() -> Any:
    model = get_peft_model(model_of("gla"), LoraConfig(target_modules=["q_proj"], r=2))  # type: ignore[arg-type]
    return model.get_base_model()


def rotated() -> PreTrainedModel:
    model = model_of("gla")
    model.config.rms_norm_eps = 0.5
    return model


OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "weights": (lambda: nudged(model_of("gla")), "its weights or adapters are others"),
    "adapters": (adapted, "its weights or adapters are others"),
    "window": (lambda: model_of("gla", window=9), "layer 0 had window 8, and has 9"),
    "sinks": (lambda: model_of("gla", sinks=3), "layer 0 had sinks 2, and has 3"),
    "mixer": (lambda: model_of("kda"), "had name gla, and has kda"),
    "combine": (lambda: model_of("gla", combine="liger"), "had combine memory, and has liger"),
    "softmax heads": (lambda: model_of("gla", softmax_heads=[1]), "had softmax_heads"),
    "dtype": (lambda: model_of("gla", dtype=torch.bfloat16), "saved in torch.float32, and the model is in torch.bf"),
    "layers": (lambda: linearize_(model_of("gla"), {**MIXER, "name": "gla"}, [1]), "its linearized layers are 0, 2, 3"),
    "configuration": (rotated, "its configuration is another"),
    "a source": (lambda: tiny_model(), "is no linearized model"),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("what", OTHERS)
def test_the_state_of_another_model_is_refused(what: str, file: Path) -> None:
    other, said = OTHERS[what]
    with pytest.raises(InputError, match=said):
        linearize.load_state(file, other())


def test_a_narrower_window_in_force_is_another_model(gla: Any, file: Path) -> None:
    with windows(gla, 4, 1), pytest.raises(InputError, match="had window 8, and has 4"):
        linearize.load_state(file, gla)
    linearize.load_state(file, gla)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_that_are_off_are_another_model() -> None:
    model: Any = get_peft_model(model_of("gla"), LoraConfig(target_modules=["q_proj"], r=2))  # type: ignore[arg-type]
    inside = model.get_base_model()
    on = files.fingerprint(inside)
    with model.disable_adapter():
        assert files.fingerprint(inside).weights != on.weights
    assert files.fingerprint(inside) == on


def test_a_model_in_memory_is_that_in_its_folder(tmp_path: Path) -> None:
    model = linearize_(tiny_model(layers=2), MIXER)
    state = linearize.save_state(*read(model), model, tmp_path / "state")
    opened, _ = load(save_converted(tmp_path / "model"))
    assert torch.equal(go_on(opened, linearize.load_state(state, opened)[0]), go_on(model, read(model)[0]))


def test_what_cannot_be_saved(gla: Any, tmp_path: Path) -> None:
    cache, tokens = read(gla)
    with torch.no_grad():
        static = gla(text(9), past_key_values=StaticCache(config=gla.config, max_cache_len=20)).past_key_values
        pair = gla(text(9).repeat(2, 1), use_cache=True).past_key_values
        source = tiny_model()(text(9), use_cache=True).past_key_values
    refused = [
        ((static, text(9)), "a static one|a StaticLayer"),
        ((pair, text(9)), "split_states"),
        ((pair, text(9).repeat(2, 1)), "one text at a time"),
        ((source, text(9)), "layer 0 is none of a linearized layer"),
        ((cache, tokens[:, :-1]), "holds 45 tokens, but 44"),
        ((cache, text(47)), "holds 45 tokens, but 47"),
        ((DynamicCache(), tokens), "layer 0 is none of a linearized layer"),
    ]
    for (cache, tokens), said in refused:
        with pytest.raises(InputError, match=said):
            linearize.save_state(cache, tokens, gla, tmp_path / "state")
    cache, tokens = read(gla)
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file" / "state"):
        with pytest.raises(InputError, match="is a folder|cannot be"):
            linearize.save_state(cache, tokens, gla, target)
        with pytest.raises(InputError, match="is a folder|cannot be"):
            files.check_target(target, gla)
    (tmp_path / "weights.safetensors").write_bytes(b"of somebody")
    (tmp_path / "link").symlink_to("weights.safetensors")
    for name, said in (
        ("weights.safetensors", "is no saved state"),
        ("link", "is no saved"),
        ("/dev/null", "a device"),
    ):
        for call in (lambda to: linearize.save_state(cache, tokens, gla, to), lambda to: files.check_target(to, gla)):
            with pytest.raises(InputError, match=said):
                call(tmp_path / name)
    assert (tmp_path / "link").read_bytes() == b"of somebody" and len(list(tmp_path.iterdir())) == 3


# --- kept


@pytest.fixture(params=["memory", "folder"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "store" if request.param == "folder" else None


def size_of(gla: Any, where: Path | None) -> int:
    """Bytes of a kept state."""
    store = StateStore(1 << 40, None if where is None else where.with_name("measured"))
    store.put(text(20), gla(text(20), use_cache=True).past_key_values, gla)
    return store.nbytes


@torch.no_grad()
def test_the_longest_beginning_is_taken(gla: Any, where: Path | None) -> None:
    store = StateStore(1 << 30, where)
    assert store.longest(text(30)[0], gla) == (None, 0)
    with pytest.raises(InputError, match="one text at a time"):
        store.longest(text(30).repeat(2, 1), gla)
    for length in (10, 20, 25):
        assert store.put(text(length), gla(text(length), use_cache=True).past_key_values, gla)
    other = torch.cat([text(22)[0], text(30, seed=4)[0]])
    for tokens, length in ((text(40)[0], 25), (text(25)[0], 25), (text(24)[0], 20), (other, 20), (text(9)[0], 0)):
        cache, known = store.longest(tokens, gla)
        assert known == length and (cache is None) == (length == 0)
        if cache is not None:
            whole = gla(tokens[None], use_cache=False).logits[:, known:]
            if known < len(tokens):
                assert torch.allclose(gla(tokens[None, known:], past_key_values=cache).logits, whole, atol=1e-5)
    assert store.longest(text(40)[0], model_of("kda"))[1] == 0
    again, _ = store.longest(text(40)[0], gla)  # what was taken has been gone on with, and what is kept has not
    assert again is not None and again.get_seq_length() == 25


@torch.no_grad()
def test_what_was_used_longest_ago_goes_first(gla: Any, where: Path | None) -> None:
    limit = 3 * size_of(gla, where)
    store = StateStore(limit, where)
    for seed in range(3):
        assert store.put(text(20, seed), gla(text(20, seed), use_cache=True).past_key_values, gla)
    assert store.longest(text(20, 0)[0], gla)[1] == 20  # used again
    store.put(text(20, 3), gla(text(20, 3), use_cache=True).past_key_values, gla)
    assert [store.longest(text(20, seed)[0], gla)[1] for seed in range(4)] == [20, 0, 20, 20]
    assert store.nbytes <= limit
    assert not StateStore(1000, where).put(text(20, 9), gla(text(20, 9), use_cache=True).past_key_values, gla)


@torch.no_grad()
def test_a_folder_holds_strangers_and_damage(gla: Any, tmp_path: Path) -> None:
    store = StateStore(1 << 30, tmp_path)
    for length in (10, 20):
        store.put(text(length), gla(text(length), use_cache=True).past_key_values, gla)
    (tmp_path / "notes.txt").write_text("mine")
    longer = next(path for path in tmp_path.iterdir() if "-20-" in path.name)
    longer.write_bytes(longer.read_bytes()[:100])
    assert store.longest(text(30)[0], gla)[1] == 10 and not longer.exists()
    (shorter,) = tmp_path.glob("*-10-*")
    renamed = longer.with_name(longer.name)
    shorter.rename(renamed)  # under the name of another text
    assert store.longest(text(30)[0], gla) == (None, 0)
    StateStore(1, tmp_path).put(text(9), gla(text(9), use_cache=True).past_key_values, gla)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("limit", "folder", "said"),
    [(0, None, "bytes_limit is 0"), ("1 GB", None, "bytes_limit is '1 GB'"), (9, "file", "cannot be made")],
)
def test_stores_that_cannot_be(limit: Any, folder: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=said):
        StateStore(limit, None if folder is None else tmp_path / folder)


PUT = """
import sys, torch
from helpers.states import model_of, text
from linearize.generation import StateStore
model, store = model_of("gla"), StateStore(int(sys.argv[2]), sys.argv[1])
with torch.no_grad():
    for round_ in range(6):
        for seed in range(4):
            cache, known = store.longest(text(30, seed)[0], model)
            assert known in (0, 20)
            if cache is not None:
                ours = model(text(30, seed)[:, 20:], past_key_values=cache).logits
                assert torch.allclose(ours, model(text(30, seed), use_cache=False).logits[:, 20:], atol=1e-4)
            store.put(text(20, seed), model(text(20, seed), use_cache=True).past_key_values, model)
"""


@pytest.mark.slow
def test_two_processes_share_a_folder(gla: Any, tmp_path: Path) -> None:
    limit = 2 * size_of(gla, tmp_path / "x") + 100  # less than they want, so that each removes what the other reads
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "LINEARIZE_NO_FSYNC": "1"}
    command = [sys.executable, "-c", PUT, str(tmp_path / "store"), str(limit)]
    both = [subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in both] == ["", ""]
    assert 0 < StateStore(limit, tmp_path / "store").nbytes <= limit
    assert all(re.fullmatch(r".*\.safetensors", path.name) for path in (tmp_path / "store").iterdir())


# --- chats and answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states") / "tiny-gla"
    model = linearize_(tiny_model(layers=3, max_position_embeddings=1 << 16), MIXER)
    # Special tokens in the middle of an answer, which a random model writes, are not in the text of its message.
    model.generation_config.suppress_tokens = [0, 2, 3]
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, Any]:
    return load(folder)


class Counted:
    """How many tokens a model reads, one for each forward pass aside; and how many of them it had read before."""

    def __init__(self, model: PreTrainedModel):
        self.tokens = 0
        model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["input_ids"].shape[1] if kwargs["input_ids"].shape[1] > 1 else 0


def conversation(loaded, store: StateStore | None) -> tuple[int, list[str]]:
    """Twenty turns, each second of which is edited; tokens that were read again, and all answers."""
    model, tokenizer = loaded
    counted, talk = Counted(model), Chat(model, tokenizer, max_new_tokens=12, temperature=0, store=store)
    answers, again, seen = [], 0, []

    def after(answer: Any) -> None:
        nonlocal again
        answers.append(answer.texts[0])
        ids = talk._ids[: len(talk._ids) - answer.new_tokens[0]]
        common = max((int((ids[: len(o)] == o[: len(ids)]).long().cumprod(0).sum()) for o in seen), default=0)
        again += counted.tokens - (len(ids) - common)
        counted.tokens = 0
        seen.append(talk._ids)

    for turn in range(20):
        after(talk.say(f"{turn}: the miller asks Anna for the boat, and for {turn * 7} sacks of flour."))
        if turn % 2:
            after(talk.edit(len(talk.messages) - 2, f"No, I mean {turn * 3} sacks, said the miller to Boris."))
    assert len(talk.messages) == 40
    return again, answers


@pytest.mark.parametrize("kept", ["memory", "folder"])
def test_an_edited_turn_reads_only_what_is_new(kept: str, loaded, tmp_path: Path) -> None:
    without, plain = conversation(loaded, None)
    again, answers = conversation(
        load(loaded[0].name_or_path), StateStore(1 << 30, tmp_path if kept == "folder" else None)
    )
    assert without > 4000 and again <= 0.05 * without, (again, without)
    assert answers == plain


def test_an_answer_is_written_again(loaded) -> None:
    model, tokenizer = loaded
    talk = Chat(model, tokenizer, max_new_tokens=8, temperature=0, store=StateStore(1 << 30))
    with pytest.raises(InputError, match="no message to answer again"):
        talk.regenerate()
    first, second = talk.say("One"), talk.say("Two")
    again = talk.regenerate()
    assert again.texts == second.texts and again.prompt_tokens == [1] and len(talk.messages) == 4
    assert talk.edit(0, "One").texts == first.texts and len(talk.messages) == 2
    del talk.messages[:]  # cut by the caller
    assert talk.say("One").prompt_tokens == [1]
    for index in (1, 5, -5):
        with pytest.raises(InputError, match=r"is none of the user; theirs are \[0\]"):
            talk.edit(index, "x")
    with pytest.raises(InputError):
        Chat(model, tokenizer, drafting=Lossless(model), store=StateStore(1))


def test_an_interrupted_answer_leaves_a_conversation_that_goes_on(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    talk, expected = (Chat(model, tokenizer, max_new_tokens=8, temperature=0) for _ in range(2))
    for each in (talk, expected):
        each.say("One")

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("A long message that is interrupted", stream=Broken())
    assert talk.say("Two").texts == expected.say("Two").texts and talk.messages == expected.messages


def test_generate_goes_on_from_a_store(loaded, where: Path | None) -> None:
    model, tokenizer = loaded
    store, options = StateStore(1 << 30, where), {"tokenizer": tokenizer, "max_new_tokens": 6, "temperature": 0}
    for raw in (False, True):
        plain = [generate(model, text, raw=raw, **options) for text in ("The river rose", "The river rose again")]
        first = generate(model, "The river rose", raw=raw, store=store, **options)
        same = generate(model, "The river rose", raw=raw, store=store, **options)
        longer = generate(model, "The river rose again", raw=raw, store=store, **options)
        assert [first.texts, longer.texts] == [each.texts for each in plain] and same.texts == first.texts
        assert first.prompt_tokens == plain[0].prompt_tokens and same.prompt_tokens == [1]
        assert not raw or longer.prompt_tokens < plain[1].prompt_tokens


KEEP = [
    ({"prompt": ["a", "b"]}, "2 prompts were given; states are of one text each"),
    ({"lossless": True}, "goes on from the source's cache"),
    ({"system": "s"}, "system stands in the state already"),
    ({"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "give the new one alone"),
]


@pytest.mark.parametrize(("options", "said"), KEEP)
def test_what_does_not_go_with_a_state(options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        generate(tmp_path, **{"prompt": "a", "state": tmp_path / "state", **options})  # type: ignore[arg-type]


# --- the command line


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any, lines: str = "") -> int:
    monkeypatch.setattr(sys, "argv", ["linearize", "generate", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as raised:
        main()
    return int(raised.value.code or 0)


def test_a_prompt_goes_on_from_a_file(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    state, options = tmp_path / "state", ("--max-new-tokens", 8, "--temperature", 0, "--json")
    talk = Chat(*load(folder), max_new_tokens=8, temperature=0)
    for turn, said in enumerate(("The river", "And the boat?", "And the mill?")):
        before = ("--state", state) if turn else ()
        assert run(monkeypatch, folder, "--prompt", said, *before, "--save-state", state, *options) == 0
        shown, expected = json.loads(capsys.readouterr().out), talk.say(said)
        assert (shown["texts"], shown["prompt_tokens"]) == (expected.texts, expected.prompt_tokens)
    assert run(monkeypatch, folder, "--state", state, "--save-state", state, *options[:4], lines="More\n") == 0
    assert talk.say("More").texts[0] in capsys.readouterr().out
    _, tokens, notes = files.read_state(state, talk.model)
    assert notes["messages"] == talk.messages and torch.equal(tokens, talk._ids)


def test_a_raw_text_goes_on_from_a_file(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    state, options = tmp_path / "state", ("--raw", "--max-new-tokens", 8, "--temperature", 0, "--json")
    assert run(monkeypatch, folder, "--prompt", "The river", "--save-state", state, *options) == 0
    first = json.loads(capsys.readouterr().out)["texts"][0]
    assert run(monkeypatch, folder, "--prompt", " and Anna", "--state", state, *options) == 0
    second = json.loads(capsys.readouterr().out)
    model: Any
    model, tokenizer = load(folder)
    ids = torch.cat([linearize.load_state(state, model)[1], torch.tensor(tokenizer(" and Anna").input_ids)])
    plain = model.generate(ids[None], max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert second["texts"] == [tokenizer.decode(plain, skip_special_tokens=True)] and first
    assert second["prompt_tokens"] == [len(tokenizer(" and Anna").input_ids)]
    for arguments in (("--prompt", "more"), ()):
        assert run(monkeypatch, folder, "--state", state, *arguments) == 2
        assert "holds a plain text and no chat" in capsys.readouterr().err


CLI = [
    (("--state", "absent"), "there is no such file"),
    (("--save-state", "."), "is a folder"),
    (("--save-state", "/proc/no/state"), "/proc/no"),
    (("--save-state", "/dev/null"), "is a device"),
    (("--lossless", "--save-state", "state"), "goes on from the source's cache"),
    (("--lossless", "--state", "state"), "goes on from the source's cache"),
]


@pytest.mark.parametrize("how", ["prompt", "chat"])
@pytest.mark.parametrize(("arguments", "said"), CLI)
def test_bad_files_of_states(how, arguments, said: str, folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = ("--prompt", "hello") if how == "prompt" else ()
    assert run(monkeypatch, folder, *arguments, *prompt, lines="hello\n") == 2
    err = capsys.readouterr().err
    assert said in " ".join(err.split()) and "Traceback" not in err and not list(tmp_path.iterdir())


def test_a_chat_that_breaks_off_keeps_its_last_answer(loaded, tmp_path: Path) -> None:
    def lines():
        yield "One\n"
        raise KeyboardInterrupt

    talk = Chat(*loaded, max_new_tokens=4, temperature=0)
    with pytest.raises(KeyboardInterrupt):
        chat(talk, lines(), io.StringIO(), tmp_path / "state")
    again = Chat(*loaded, max_new_tokens=4, temperature=0)
    again.resume(tmp_path / "state")
    assert again.messages == talk.messages and again.say("Two").texts == talk.say("Two").texts
    with pytest.raises(InputError, match="it has begun"):
        again.resume(tmp_path / "state")
    chat(Chat(*loaded), iter([]), io.StringIO(), tmp_path / "nothing")  # nothing was said
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(InputError, match="nothing has been answered yet"):
        Chat(*loaded).save(tmp_path / "nothing")


# --- fewer bits


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", sorted({*MIXERS} - {"softmax", "window"}))
def test_a_short_text_goes_on_by_steps_before_anything_has_left_the_window(name: str, dtype: str) -> None:
    """The logarithm of an empty sum is infinite: int8 made it and all beside it NaN."""
    model, ids = model_of(name, state_dtype=dtype), text(3 * W)
    cache = DynamicCache(config=model.config)
    parts = (1, 2, 2, *[1] * (3 * W - 5))
    steps = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(parts, 1)], 1)
    whole = model_of(name)(ids, use_cache=False).logits
    assert torch.allclose(steps[:, :W], whole[:, :W], atol=1e-4), "nothing has been rounded yet"
    assert (steps - whole).norm() < 0.2 * whole.norm()


# --- batches

BATCHES = [name for name in CASES if name not in ("bf16", "a short text", "softmax")]


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
def test_states_of_different_texts_are_one_batch(name: str) -> None:
    case = CASES[name]
    model, lengths = model_of(**case), (31, 5, 60)
    alone = [read(model, back=case.get("back", 0), read=length)[0] for length in lengths]
    counts = [int(cache.get_seq_length()) for cache in alone]
    batch, longest = stack_states(alone), max(counts)
    real = torch.tensor([[0] * (longest - count) + [1] * count for count in counts])
    new = torch.cat([text(14, seed) for seed in range(3)])
    for start, end in ((0, 1), (1, 2), (2, 12), (12, 13), (13, 14)):
        mask = torch.cat([real, torch.ones(3, end, dtype=torch.int64)], 1)
        positions = (mask.cumsum(1) - 1)[:, -(end - start) :]
        got = model(new[:, start:end], past_key_values=batch, attention_mask=mask, position_ids=positions).logits
        for row in range(3):
            expected = model(new[row : row + 1, start:end], past_key_values=alone[row]).logits
            assert torch.allclose(got[row], expected[0], atol=2e-4), float((got[row] - expected[0]).abs().max())
    for row, cache in enumerate(split_states(batch)):
        assert cache.get_seq_length() == counts[row] + 14
        assert torch.allclose(go_on(model, cache), go_on(model, copied(alone[row])), atol=2e-4)


@torch.no_grad()
def test_generate_takes_a_stacked_batch(gla: Any) -> None:
    texts = [text(length, length)[0] for length in (31, 4, 18)]
    caches = [gla(ids[None, :-1], use_cache=True).past_key_values for ids in texts]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    alone = [gla.generate(ids[None], **options)[0, len(ids) :] for ids in texts]
    ids = torch.stack([torch.cat([torch.full((31 - len(each),), 2), each]) for each in texts])
    mask = torch.stack([torch.cat([torch.zeros(31 - len(each)), torch.ones(len(each))]) for each in texts]).long()
    together = gla.generate(ids, attention_mask=mask, past_key_values=stack_states(caches), **options)
    assert together[:, 31:].tolist() == [each.tolist() for each in alone]


@torch.no_grad()
def test_rows_of_different_length_need_their_own_positions(gla: Any, tmp_path: Path) -> None:
    caches = [gla(text(length), use_cache=True).past_key_values for length in (12, 5)]
    ones, positions = torch.ones(2, 13, dtype=torch.int64), torch.tensor([[12], [5]])
    for given in ({}, {"attention_mask": ones, "position_ids": positions}, {"position_ids": positions}):
        with pytest.raises(InputError, match=r"have \[12, 5\] tokens"):
            gla(text(1).repeat(2, 1), past_key_values=stack_states(caches), **given)
    with pytest.raises(InputError, match=r"have \[12, 5\] tokens"):
        gla.generate(text(13).repeat(2, 1), past_key_values=stack_states(caches), max_new_tokens=2)
    first, second = split_states(stack_states(caches))
    linearize.save_state(second, text(5), gla, tmp_path / "row")
    assert torch.equal(go_on(gla, linearize.load_state(tmp_path / "row", gla)[0]), go_on(gla, caches[1]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gla", "sliding layers", "softmax heads"])
def test_a_padded_batch_is_taken_apart(name: str) -> None:
    """Rows of one call of `generate`, each of which goes on alone."""
    model, lengths = model_of(**CASES[name]), (31, 4, 18)
    ids = torch.stack([torch.cat([torch.full((31 - n,), 2), text(n, n)[0]]) for n in lengths])
    mask = torch.stack([torch.cat([torch.zeros(31 - n), torch.ones(n)]) for n in lengths]).long()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    output = model.generate(ids, attention_mask=mask, max_new_tokens=9, return_dict_in_generate=True, **options)
    for row, cache in enumerate(split_states(output.past_key_values)):
        whole = output.sequences[row : row + 1, 31 - lengths[row] :]
        assert cache.get_seq_length() == whole.shape[1] - 1
        ours = model(whole[:, -1:], past_key_values=cache).logits
        assert torch.allclose(ours, model(whole, use_cache=False).logits[:, -1:], atol=2e-4)


@torch.no_grad()
def test_batches_that_cannot_be(gla: Any) -> None:
    cache, other = read(gla)[0], read(model_of("kda"))[0]
    for caches, said in (([], "there are no caches"), ([cache, other], "not of one model")):
        with pytest.raises(InputError, match=said):
            stack_states(caches)
    softmax = tiny_model()(text(9).repeat(2, 1), use_cache=True).past_key_values
    with pytest.raises(InputError, match="pass lengths"):
        split_states(softmax)
    assert [each.get_seq_length() for each in split_states(softmax, [9, 4])] == [9, 4]
    with pytest.raises(InputError, match=r"the cache has counted \[45\]"):
        split_states(cache, [3])


def test_the_names_are_public() -> None:
    for name in ("save_state", "load_state", "StateStore", "stack_states", "split_states"):
        assert getattr(linearize, name) and getattr(verbs, name) and name in linearize.__all__
