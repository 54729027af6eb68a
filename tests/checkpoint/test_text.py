"""Facts that tokenizer, template, generation settings and model each state: what happens where they differ."""

import time
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from tokenizers import normalizers, processors
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from linearize.checkpoint import text
from linearize.checkpoint.open import load
from linearize.errors import InputError
from linearize.generation import Chat, generate
from linearize.model.modeling import linearize_

MIXER = {"name": "gla", "window": 8, "sinks": 2}
ROWS = 384


@pytest.fixture
def model() -> PreTrainedModel:
    return linearize_(tiny_model(layers=2), MIXER).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def written(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answer(model, tokenizer, prompt="Hello there", **options):
    return generate(model, prompt, tokenizer=tokenizer, **{"max_new_tokens": 6, "temperature": 0, **options})


# --- ids and rows of the embedding


def test_padding_that_has_no_row(model, tokenizer, tmp_path: Path):
    """Instance: [PAD] added to the tokenizer, and the embedding not resized."""
    expected = answer(model, tiny_tokenizer(), ["Hello", "The river rose"]).texts
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == ROWS
    assert text.beyond(tokenizer.get_vocab(), ROWS) == {"[PAD]": ROWS}
    folder = written(model, tokenizer, tmp_path / "model")
    assert generate(folder, ["Hello", "The river rose"], max_new_tokens=6, temperature=0).texts == expected
    assert load(folder)[1].pad_token_id < ROWS  # what the evaluation pads with


@pytest.mark.parametrize("prompt", ["say <tool> now", [{"role": "user", "content": "<tool>"}], ["Hello", "<tool>"]])
def test_a_token_that_has_no_row(model, tokenizer, prompt):
    tokenizer.add_tokens(["<tool>"])
    with pytest.raises(InputError, match=r"prompt: the text has the token '<tool>', number 384, .* has 384 rows"):
        answer(model, tokenizer, prompt)


def test_a_token_beyond_reaches_no_model(model):
    """Whatever made the ids: the model says which one it cannot embed."""
    with pytest.raises(InputError, match="input_ids: token 384 .* 384 rows"):
        model(torch.tensor([[3, ROWS]]))
    with pytest.raises(InputError, match="input_ids: token -100"):
        model(torch.tensor([[3, -100]]))


# --- where an answer ends


@pytest.mark.parametrize(
    ("settings", "config", "eos", "expected"),
    [
        ({"eos_token_id": 7}, 7, "<|im_end|>", [1, 7]),
        ({"eos_token_id": [7, 9]}, 11, "<|im_end|>", [1, 7, 9, 11]),
        ({}, None, "<|endoftext|>", [0, 1]),  # 1 is what the template writes behind an answer
        ({"eos_token_id": 7}, None, None, [1, 7]),
    ],
)
def test_an_answer_ends_at_every_token_that_is_said_to_end_it(model, tokenizer, settings, config, eos, expected):
    """Instance: an end of turn in generation_config that is not the tokenizer's."""
    model.generation_config = GenerationConfig(**settings)
    model.config.eos_token_id = config
    tokenizer.eos_token = eos
    assert text.end_tokens(model, tokenizer) == expected


def test_a_chat_ends_at_the_tokens_of_both(model, tokenizer):
    first = answer(model, tokenizer, "Hello", raw=True)
    assert first.new_tokens[0] > 1
    ids = tokenizer("Hello").input_ids
    following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = following
    assert answer(model, tokenizer, "Hello", raw=True).new_tokens == [1]


# --- settings of the model's author


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"output_attentions": True, "output_scores": True, "return_dict_in_generate": False},
        {"max_length": 4, "min_length": 900},
        {"guidance_scale": 1.5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"max_time": 0.0001},
        {"forced_bos_token_id": 9},
        {"pad_token_id": 4000, "bos_token_id": 4001},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore:generation_config.json")
def test_settings_that_an_answer_cannot_have(model, tokenizer, settings):
    """Instance: num_beams 4, with which nothing can be streamed; a static cache at a chat's second turn."""
    expected = answer(model, tokenizer).texts
    model.generation_config = GenerationConfig(**settings)
    assert answer(model, tokenizer).texts == expected
    chat = Chat(model, tokenizer, max_new_tokens=3, temperature=0)
    for _ in range(2):
        assert chat.say("Hello").new_tokens[0] <= 3
    given = model.generation_config.to_diff_dict()
    assert {key: given[key] for key in settings} == settings  # the model keeps them


def test_what_is_not_followed_is_said(model, tokenizer):
    model.generation_config = GenerationConfig(num_beams=4)
    with pytest.warns(UserWarning, match="generation_config.json: not followed here: num_beams 4"):
        answer(model, tokenizer)


def test_what_an_author_says_of_sampling_is_followed(model, tokenizer):
    plain = answer(model, tokenizer, temperature=None).texts[0]
    banned = [[number] for number in tokenizer(plain, add_special_tokens=False).input_ids]
    model.generation_config = GenerationConfig(bad_words_ids=banned)
    assert answer(model, tokenizer, temperature=None).texts[0] != plain
    model.generation_config = GenerationConfig(stop_strings=[plain[:1]])
    shorter = answer(model, tokenizer, temperature=None).texts[0]
    assert plain.startswith(shorter) and shorter != plain


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0, "do_sample": True}, {"top_p": 7.0, "do_sample": True}, {"repetition_penalty": -2.0},
     {"temperature": "hot", "do_sample": True}, {"suppress_tokens": "many"}],
    ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing(model, tokenizer, settings):
    model.generation_config = GenerationConfig()
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    with pytest.raises(InputError, match=r"generation_config.json: .*mend the file"):
        answer(model, tokenizer, temperature=None)


# --- other people's templates


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0]['name']['first'] }}", "no attribute"),
        ("{{ messages | map('nothing') | list }}", "nothing"),
        ("{% for message in messages %}", "endfor"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[7].content }}", "no element 7"),
        ("", "writes nothing"),
        ("{% for a in messages %}{% endfor %}", "writes nothing"),
    ],
)
def test_a_template_that_raises(model, tokenizer, template, says):
    """Instance: a template without a role for the system."""
    tokenizer.chat_template = template or "{# #}"
    with pytest.raises(InputError, match=f"chat template: .*{says}"):
        answer(model, tokenizer)
    chat = Chat(model, tokenizer, max_new_tokens=2, temperature=0)
    with pytest.raises(InputError, match="chat template"):
        chat.say("Hello")
    assert chat.messages == []


def test_a_template_that_does_not_end(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "TEMPLATE_SECONDS", 0.3)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop
    start = time.perf_counter()
    with pytest.raises(InputError, match="does not end"):
        text.render(tokenizer, [{"role": "user", "content": "a"}])
    assert time.perf_counter() - start < 5


# --- what a tokenizer does of itself


def test_an_end_of_text_that_the_tokenizer_puts_behind(model, tokenizer):
    expected = answer(model, tokenizer, "The river", raw=True).texts
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 1)]
    )
    assert tokenizer("a").input_ids[-1] == 1
    assert answer(model, tokenizer, "The river", raw=True).texts == expected
    said = text.encode(tokenizer, "The river<|im_end|>", ROWS, special=True)
    assert said.tolist()[-2:] != [1, 1] and said[-1] == 1  # the one that the text itself has stays


@pytest.mark.parametrize("prompt", [" ", "\u200b", ["Hello", " "]])
def test_a_prompt_of_which_the_normalizer_leaves_nothing(model, tokenizer, prompt):
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Replace("\u200b", "")]
    )
    with pytest.raises(InputError, match="the tokenizer finds no token in it"):
        answer(model, tokenizer, prompt, raw=True)


@pytest.mark.parametrize("behind", ["<|pad|>", "<|im_end|> <|im_end|>", "<|im_end|> <|pad|>"])
def test_whatever_the_tokenizer_puts_behind_a_prompt_is_left_out(model, tokenizer, behind: str):
    expected = text.encode(tokenizer, "The river", ROWS, special=True)
    special = [("<|endoftext|>", 0), ("<|im_end|>", 1), ("<|pad|>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|endoftext|> $A {behind}", special_tokens=special
    )
    assert text.encode(tokenizer, "The river", ROWS, special=True).tolist() == [0, *expected.tolist()]


@pytest.mark.parametrize("behind", ["<turn>", ".<turn>\n", "\n<turn> <|im_end|>"])
def test_the_end_of_a_turn_is_found_in_the_template(model, tokenizer, behind: str):
    """Also a token that was added as no special one, or behind a full stop."""
    tokenizer.add_tokens(["<turn>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content']|upper }}" + behind + "{% endfor %}"
    model.generation_config, model.config.eos_token_id, tokenizer.eos_token = GenerationConfig(), None, None
    assert text.end_tokens(model, tokenizer) == [ROWS]
