"""Text from converted folders: streams, batches, sampling, and a chat that reads every token once."""

import io
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from linearize.checkpoint.open import load
from linearize.errors import InputError
from linearize.generation import Chat, chat, generate
from linearize.model.modeling import linearize_

MIXER = {"name": "gla", "combine": "memory", "window": 8, "sinks": 2}
LONG = "Anna brought the boat to the mill, and the miller said the river would rise."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "tiny-gla"
    linearize_(tiny_model(layers=3), MIXER).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return load(folder)


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The most likely continuation without any cache, ended by the end token."""
    ids, ends = list(ids), []
    while len(ends) < count and 1 not in ends:
        with torch.no_grad():
            ends.append(int(model(torch.tensor([ids + ends]), use_cache=False).logits[0, -1].argmax()))
    return ends


def test_a_prompt_is_streamed_as_it_is_returned(folder: Path, loaded):
    model, tokenizer = loaded
    out = io.StringIO()
    answer = generate(folder, LONG, max_new_tokens=12, temperature=0, stream=out)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": LONG}], add_generation_prompt=True).input_ids
    expected = greedy(model, prompt, 12)
    assert answer.texts == [tokenizer.decode(expected, skip_special_tokens=True)]
    assert out.getvalue() == answer.texts[0] + "\n"
    assert (answer.prompt_tokens, answer.new_tokens) == ([len(prompt)], [len(expected)])
    assert 0 < answer.prefill_seconds < answer.seconds
    rate = (len(expected) - 1) / (answer.seconds - answer.prefill_seconds)
    assert answer.tokens_per_second == pytest.approx(rate)
    assert answer.to_dict()["texts"] == answer.texts


def test_messages_raw_text_and_missing_template(loaded):
    model, tokenizer = loaded
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    answer = generate(model, messages, tokenizer=tokenizer, max_new_tokens=2, temperature=0)
    assert answer.prompt_tokens == [len(tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids)]
    raw = generate(model, "Hello", tokenizer=tokenizer, max_new_tokens=2, temperature=0, raw=True)
    assert raw.prompt_tokens == [len(tokenizer("Hello").input_ids)]
    tokenizer.chat_template = None
    plain = generate(model, "Hello", tokenizer=tokenizer, max_new_tokens=2, temperature=0)
    assert plain.texts == raw.texts and plain.prompt_tokens == raw.prompt_tokens
    with pytest.raises(InputError, match="no chat template"):
        generate(model, messages, tokenizer=tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        Chat(model, tokenizer)


def test_a_batch_gives_what_each_prompt_gives_alone(loaded):
    model, tokenizer = loaded
    prompts = ["Hi", LONG, "Numbers: 0 1 2 3"]
    alone = [generate(model, text, tokenizer=tokenizer, max_new_tokens=16, temperature=0) for text in prompts]
    together = generate(model, prompts, tokenizer=tokenizer, max_new_tokens=16, temperature=0)
    assert together.texts == [answer.texts[0] for answer in alone]
    assert together.new_tokens == [answer.new_tokens[0] for answer in alone]
    assert together.prompt_tokens == [answer.prompt_tokens[0] for answer in alone]


def test_an_end_token_ends_its_own_row_only(loaded):
    model, tokenizer = loaded
    short, long = (greedy(model, _ids(tokenizer, text), 8) for text in ("Hi", LONG))
    end = next(position for position, token in enumerate(short) if token not in long and position)
    model.generation_config.eos_token_id = short[end]
    answer = generate(model, ["Hi", LONG], tokenizer=tokenizer, max_new_tokens=8, temperature=0)
    assert answer.new_tokens == [end + 1, len(long)]
    assert answer.texts[1] == tokenizer.decode(long, skip_special_tokens=True)


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True).input_ids


def test_sampling_is_repeatable_and_follows_the_folder_by_default(loaded):
    model, tokenizer = loaded
    options = {"tokenizer": tokenizer, "max_new_tokens": 16}
    first = generate(model, LONG, temperature=1.0, top_p=0.95, seed=3, **options)
    assert generate(model, LONG, temperature=1.0, top_p=0.95, seed=3, **options).texts == first.texts
    assert generate(model, LONG, temperature=1.0, top_p=0.95, seed=4, **options).texts != first.texts
    # A tiny nucleus holds the most likely token only.
    greedy = generate(model, LONG, temperature=0, **options).texts
    assert generate(model, LONG, temperature=1.0, top_p=1e-6, seed=3, **options).texts == greedy
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_p=0.95)
    assert generate(model, LONG, seed=3, **options).texts == first.texts
    assert generate(model, LONG, temperature=0, **options).texts == greedy


def test_the_model_keeps_its_generation_config(loaded):
    model, tokenizer = loaded
    before = model.generation_config.to_dict()
    generate(model, "Hi", tokenizer=tokenizer, max_new_tokens=2, temperature=0.5, top_p=0.9)
    assert model.generation_config.to_dict() == before


def test_a_chat_reads_every_token_once_and_answers_as_if_it_read_all(loaded):
    model, tokenizer = loaded
    talk = Chat(model, tokenizer, system="Be brief.", max_new_tokens=10, temperature=0)
    steps, sizes = [], []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for turn, text in enumerate(("one", LONG, "three")):
        known, done = len(talk._ids), len(steps)
        answer = talk.say(text)
        read = len(talk._ids) - answer.new_tokens[0]
        assert answer.prompt_tokens == [read - known]
        # After the first turn, the last token of the answer before is read too: nobody had asked for its successor.
        assert steps[done] == read - known + (turn > 0)
        expected = greedy(model, talk._ids[:read].tolist(), 10)
        assert talk._ids[read:].tolist() == expected
        assert answer.texts == [tokenizer.decode(expected, skip_special_tokens=True)]
        assert talk._cache is not None
        sizes.append(talk._cache.layers[0].nbytes())
    assert sizes[0] == sizes[2]
    assert [message["role"] for message in talk.messages] == ["system"] + ["user", "assistant"] * 3
    assert talk.messages[3]["content"] == LONG


def test_a_template_that_rewrites_earlier_turns_is_read_anew(loaded):
    model, tokenizer = loaded
    tokenizer.chat_template = (  # only the last message, as templates that drop earlier reasoning do
        "{% for message in messages[-1:] %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    )
    talk = Chat(model, tokenizer, max_new_tokens=6, temperature=0)
    talk.say("one")
    answer = talk.say(LONG)
    fresh = Chat(model, tokenizer, max_new_tokens=6, temperature=0).say(LONG)
    assert (answer.texts, answer.prompt_tokens) == (fresh.texts, fresh.prompt_tokens)


def test_a_chat_answers_line_by_line(loaded):
    model, tokenizer = loaded
    out = io.StringIO()
    talk = Chat(model, tokenizer, max_new_tokens=4, temperature=0)
    messages = chat(talk, iter(["Hello\n", "\n", "Again\n"]), out)
    assert [message["content"] for message in messages[::2]] == ["Hello", "Again"]
    first, second = messages[1]["content"], messages[3]["content"]
    assert out.getvalue() == f"> {first}\n> > {second}\n> \n"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        (["a", ""], {}, "the prompt is empty"),
        ("a", {"max_new_tokens": 0, "top_p": 2.0}, "max_new_tokens is 0.*; top_p is 2.0"),
        ("a", {"temperature": -1.0}, "temperature is -1.0"),
        ("a", {"top_p": 0.0}, "top_p is 0.0"),
        (["a", "b"], {"stream": io.StringIO()}, "2 prompts cannot be streamed"),
    ],
)
def test_settings_out_of_range(prompt, options: dict, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        generate(tmp_path / "never-opened", prompt, **options)


def test_chat_settings_out_of_range(loaded):
    with pytest.raises(InputError, match="chat: max_new_tokens is 0"):
        Chat(*loaded, max_new_tokens=0)


def test_folders_that_cannot_be_opened(loaded, tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match="has no configuration that transformers can read"):
        load(tmp_path)
    with pytest.raises(InputError, match="acme/nothing: "):
        load("acme/nothing")
    model, _ = loaded
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no usable tokenizer"):
        load(tmp_path)
    with pytest.raises(InputError, match="without its tokenizer"):
        generate(model, "Hi")


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_an_answer_ends_where_a_learned_table_of_positions_does(kind: str):
    """Instance: a prompt near the end of the table ended in an IndexError that blamed generation_config.json."""
    model = linearize_(tiny_model(kind, 2, max_position_embeddings=40, n_positions=40), MIXER).eval()
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.decode(tokenizer(LONG).input_ids[:30])
    answer = generate(model, prompt, tokenizer=tokenizer, raw=True, max_new_tokens=100, temperature=0)
    assert answer.prompt_tokens[0] + answer.new_tokens[0] <= 40
    with pytest.raises(InputError, match="prompt: .* learned positions for 40"):
        generate(model, LONG * 3, tokenizer=tokenizer, raw=True, max_new_tokens=2)
