"""Arguments of forward and generate that surgery honours or refuses, and never drops."""

import copy
import inspect
import io
import multiprocessing
import pickle

import pytest
import torch
from helpers.tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from linearize.errors import InputError
from linearize.model.branches import branches
from linearize.model.modeling import linearize_

MIXER = {"name": "gla", "combine": "memory", "window": 4, "sinks": 2}
LENGTHS = (5, 9, 2)  # tokens of packed documents


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return linearize_(tiny_model(layers=3), MIXER, layers=[0, 2]).eval()  # a softmax layer between two others


def tokens(batch: int = 2, length: int = sum(LENGTHS)) -> Tensor:
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(0))


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def packed(batch: int = 2) -> Tensor:
    """[B, 1, T, T]: each document sees itself."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = causal(len(document)) & (document[:, None] == document)
    return mask[None, None].repeat(batch, 1, 1, 1)


def padded(real: Tensor) -> Tensor:
    """[B, 1, T, T] of a padding mask [B, T]; padding sees nothing."""
    return causal(real.shape[1])[None, None] & real.bool()[:, None, None] & real.bool()[:, None, :, None]


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def positions() -> Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def logits(model: PreTrainedModel, ids: Tensor, **arguments) -> Tensor:
    with torch.no_grad():
        # With a cache, the softmax layers of transformers take no notice of packing.
        return model(ids, **{"use_cache": "past_key_values" in arguments, **arguments}).logits


@pytest.mark.parametrize("form", [lambda mask: mask, added, lambda mask: mask.expand(-1, 4, -1, -1)])
def test_a_block_mask_is_packing(model, form):
    """Instance: a mask of four dimensions was ignored, and every document read those before it."""
    expected = logits(model, tokens(), position_ids=positions())
    assert not torch.allclose(expected, logits(model, tokens()), atol=1e-2)
    actual = logits(model, tokens(), attention_mask=form(packed()), position_ids=positions())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("side", "seeing"), [("left", False), ("left", True), ("right", False)])
def test_a_mask_of_four_dimensions_is_padding(model, side: str, seeing: bool):
    real = torch.ones(2, 16, dtype=torch.int64)
    real[1, slice(0, 5) if side == "left" else slice(11, 16)] = 0
    mask = padded(real)
    if seeing:  # what transformers makes of rows that would see nothing
        mask |= ~mask.any(-1, keepdim=True)
    expected, actual = (logits(model, tokens(), attention_mask=each) for each in (real, added(mask)))
    torch.testing.assert_close(actual[real.bool()], expected[real.bool()], atol=1e-5, rtol=1e-5)


def test_documents_behind_padding_and_between_it(model):
    """Both at once: what comes out is what each document gives alone."""
    ids, real = tokens(1, 14), torch.ones(1, 14, dtype=torch.int64)
    real[0, :3] = real[0, 12:] = 0
    document = torch.tensor([0] * 7 + [1] * 7)
    mask = padded(real) & (document[:, None] == document)
    position = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0]])
    actual = logits(model, ids, attention_mask=added(mask), position_ids=position)
    for part in (slice(3, 7), slice(7, 12)):
        torch.testing.assert_close(actual[:, part], logits(model, ids[:, part]), atol=1e-5, rtol=1e-5)


def test_a_mask_over_a_cache(model):
    """The second block of a text may come with a mask of four dimensions over all of it."""
    ids, real = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    real[1, :4] = 0
    expected = logits(model, ids, attention_mask=real)
    cache = DynamicCache()
    logits(model, ids[:, :8], attention_mask=real[:, :8], past_key_values=cache)
    mask = padded(real)[:, :, 8:]
    wrong = mask.clone()
    wrong[0, :, :, :3] = False
    with pytest.raises(InputError, match="attention_mask"):
        logits(model, ids[:, 8:], attention_mask=wrong, past_key_values=copy.deepcopy(cache))
    actual = logits(model, ids[:, 8:], attention_mask=added(mask), past_key_values=cache)
    torch.testing.assert_close(actual, expected[:, 8:], atol=1e-4, rtol=1e-4)


def sliding(mask: Tensor) -> Tensor:
    return mask & ~torch.ones_like(mask).tril(-4)


def prefix_tree(mask: Tensor) -> Tensor:
    mask[:, :, 7:, 3:6] = False  # two branches behind one beginning
    return mask


def looking_ahead(mask: Tensor) -> Tensor:
    mask[:, :, :4, :4] = True
    return mask


@pytest.mark.parametrize("change", [sliding, prefix_tree, looking_ahead])
def test_masks_that_no_recurrence_can_honour(model, change):
    with pytest.raises(InputError, match="attention_mask: a mask of four dimensions"):
        logits(model, tokens(), attention_mask=change(causal(16)[None, None].repeat(2, 1, 1, 1)))


def test_other_masks_are_refused(model):
    bias = added(packed()) * 0 - torch.arange(16.0)  # ALiBi
    by_head = packed().repeat(1, 4, 1, 1)
    by_head[:, 1, 3, 1] = False
    for mask in (bias, by_head, packed()[:, 0]):
        with pytest.raises(InputError, match="attention_mask"):
            logits(model, tokens(), attention_mask=mask)


def test_masks_by_type_of_layer():
    """A source with sliding layers takes a mask for each kind of layer; the linearized ones see the whole text."""
    source = tiny_model("gemma3_text", 4, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
    model = linearize_(source, MIXER).eval()
    masks = {"full_attention": added(packed()), "sliding_attention": added(sliding(packed()))}
    expected = logits(model, tokens(), position_ids=positions())
    actual = logits(model, tokens(), attention_mask=masks, position_ids=positions())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(actual, logits(model, tokens()), atol=1e-2)


def test_what_a_mixer_cannot_honour_is_refused(model):
    with pytest.raises(InputError, match="output_attentions"):
        model(tokens(), output_attentions=True)
    with pytest.raises(InputError, match="is_causal"):
        model(tokens(), is_causal=False)
    ends = torch.tensor([0, 5, 14, 16], dtype=torch.int32)
    with pytest.raises(InputError, match="cu_seq_lens_q: names 3 packed documents"):
        model(tokens(1), cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False)
    model(tokens(1), cu_seq_lens_q=ends, cu_seq_lens_k=ends, position_ids=positions(), use_cache=False)
    with branches(model, "source"):  # softmax has no such limits
        model(tokens(), attention_mask=sliding(packed()))


def test_attentions_asked_for_by_the_configuration():
    model = linearize_(tiny_model(layers=2), MIXER).eval()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(InputError, match="output_attentions"):
        model(tokens())


def test_methods_have_the_signatures_of_the_source():
    """Instance: `generate(inputs_embeds=...)` was refused, because transformers looks for it in a signature."""
    source = tiny_model(layers=2)
    expected = {
        name: inspect.signature(getattr(source, name))
        for name in (
            "__init__",
            "forward",
            "generate",
            "prepare_inputs_for_generation",
            "save_pretrained",
            "load_adapter",
        )
    }
    attention = inspect.signature(source.model.layers[0].self_attn.forward)
    model = linearize_(source, MIXER).eval()
    for name, signature in expected.items():
        assert inspect.signature(getattr(model, name)) == signature, name
    assert inspect.signature(model.model.layers[0].self_attn.forward) == attention


def test_generation_from_embeddings(model):
    ids = tokens(2, 8)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    embeddings = model.get_input_embeddings()(ids)
    actual = model.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert actual.tolist() == expected[:, 8:].tolist()


def _answer(model: PreTrainedModel, queue) -> None:
    queue.put(logits(model, tokens()).sum().item())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_models_can_be_pickled(name: str):
    """Instance: torch.save of a whole model, whose classes no module holds."""
    model = linearize_(tiny_model(name, 2), MIXER, layers=[1]).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is type(model) and type(again.config) is type(model.config)
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))
        assert again.config.to_dict() == model.config.to_dict()


def test_caches_and_configurations_can_be_pickled(model):
    cache = DynamicCache()
    logits(model, tokens()[:, :9], past_key_values=cache)
    again = pickle.loads(pickle.dumps(cache))
    following = tokens()[:, 9:10]
    expected = logits(model, following, past_key_values=cache)
    assert torch.equal(logits(model, following, past_key_values=again), expected)
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)
    assert pickle.loads(pickle.dumps(type(model))) is type(model)


def test_a_model_crosses_to_another_process(model):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(model, queue))
    process.start()
    assert queue.get(timeout=120) == pytest.approx(logits(model, tokens()).sum().item(), rel=1e-5)
    process.join()


def test_a_mask_that_is_shorter_than_the_text_leaves_the_rest_out(model):
    short, whole = torch.ones(2, 10, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64)
    whole[:, 10:] = 0
    expected = logits(model, tokens(), attention_mask=whole)
    assert torch.equal(logits(model, tokens(), attention_mask=short)[:, :10], expected[:, :10])


@pytest.mark.parametrize("ids", [torch.arange(16) * 2, torch.cat([torch.arange(8), torch.arange(20, 28)])])
def test_with_a_cache_a_jump_of_positions_is_no_new_document(ids: Tensor):
    """As in the source; without a cache transformers takes every jump for one, and so do we."""
    source = tiny_model(layers=2)
    model = linearize_(copy.deepcopy(source), {"name": "window", "window": 64, "sinks": 2}).eval()
    for cached in (True, False):
        ours, theirs = (logits(each, tokens(), position_ids=ids[None], use_cache=cached) for each in (model, source))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
