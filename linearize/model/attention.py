"""Attention modules of a source with their forward kept and their attention function routed to a mixer."""

import copy
import inspect
from contextlib import nullcontext
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Cache, PreTrainedConfig

from ..errors import InputError
from . import architectures, host, softmax_heads, transformers_api
from .cache import LinearizedCacheLayer
from .decoding import know_each_other, settle, steps
from .made import Made, as_inspected
from .mixers import MIXERS, Context, MixerConfig
from .ops.rows import Packed, Rows

IMPLEMENTATION = "linearize"
"""Under which name transformers finds `attention`."""
# Mixed-in classes rely on the source's class that follows them, which a type checker cannot know.
_Source: Any = object


# --- attention


class LinearizedAttention(_Source):
    """Mixed into the source's attention class.

    Attributes:
        source_class: the source's attention class.
        arguments: names of the positional arguments of its forward, after the hidden states.
        source_config: configuration of the whole model.
        rope: how it rotates queries and keys.
        mixer: what runs in place of the source's attention function.
        softmax_heads: key/value heads that keep that function.
        branch: which path runs now, of `branches.BRANCHES`.
    """

    source_class: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]
    branch: str = "all"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any):
        """The source's own forward, told what the attention function inside it has to know.

        Args:
            hidden_states: [B, T, hidden size].
            *args: of the source's forward.
            **kwargs: of the source's forward, and what `_before_decoder` added.

        Returns:
            What the source's forward returns.

        Raises:
            RuntimeError: the decoder layer does not pass on what `_before_decoder` added.
        """
        if args:
            kwargs.update(zip(self.arguments, args, strict=False))
        mask = kwargs.pop("attention_mask", None)
        if isinstance(mask, _MaskWithArguments):
            kwargs |= mask.arguments
            mask = mask.mask
        complete = "linearize_rows" in kwargs
        rows, steps = kwargs.pop("linearize_rows", None), kwargs.pop("linearize_steps", None)
        if self.branch == "source":
            return super().forward(hidden_states, attention_mask=mask, **kwargs)
        if not complete:
            raise RuntimeError(
                f"{type(self).__name__}: the decoder layer drops keyword arguments, padding among them; its model type "
                "needs a row in linearize/model/architectures.py with drops_arguments"
            )
        past = transformers_api.cache_of(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in transformers_api.CACHE_NAMES}
        call = _Call(past, rows, mask, kwargs.get("position_embeddings"), steps or {})
        if self.layer_idx in call.steps:
            call.steps[self.layer_idx][0].positions[self.layer_idx] = call.position_embeddings
        return super().forward(hidden_states, attention_mask=None, linearize_call=call, **kwargs)


class _MaskWithArguments(NamedTuple):
    """A mask with arguments for the attention on it, through decoder layers that drop arguments they do not know."""

    mask: Tensor | None
    arguments: dict[str, Any]


class _Call(NamedTuple):
    """What the swapped forward hands to `attention` through the source's own forward."""

    past: Cache | None
    rows: Rows | Packed | None
    mask: Any
    position_embeddings: Any
    steps: dict[int, Any]


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, linearize_call=None, **kwargs: Any
):
    """The registered attention function, which the source's forward calls.

    Args:
        module: the linearized attention module.
        query: [B, H, T, K].
        key: [B, G, T, K].
        value: [B, G, T, V].
        attention_mask: the source's; None where `linearize_call` has it.
        linearize_call: of `LinearizedAttention.forward`; None runs the source's attention.
        **kwargs: of the source's attention function (scaling, softcap, s_aux, …).

    Returns:
        The outputs [B, T, H, V], and None for the weights, which are never made.
    """

    def source(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        return transformers_api.source_attention(module.source_config, module.source_class)(
            module, q, k, v, mask, **kwargs
        )

    if linearize_call is None:
        return source(query, key, value, attention_mask)
    call: _Call = linearize_call

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return source(q, k, v, call.mask)[0].transpose(1, 2)

    def unrotate(x: Tensor) -> Tensor:
        return architectures.unrotate(module, x, call.position_embeddings)

    scaling = kwargs.get("scaling")
    context = Context(
        layer_idx=module.layer_idx,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        extra=kwargs.get("s_aux"),
        unrotate=unrotate,
        rows=call.rows,
        cache=call.past,
        branch=module.branch,
        attend=attend,
        steps=call.steps,
    )
    device = query.device.type
    # Autocast would take the products of fp32 states through bf16.
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        y = softmax_heads.run(module.mixer, module.softmax_heads, query, key, value, context)
        return y.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, attention)
transformers_api.AttentionMaskInterface.register(IMPLEMENTATION, transformers_api.sdpa_mask)


@cache
def attention_class(source: type[nn.Module]) -> type[nn.Module]:
    """The linearized subclass of a source's attention class."""
    parameters = inspect.signature(source.forward).parameters.values()
    arguments = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[2:]
    values = {"source_class": source, "arguments": arguments, "__module__": __name__}
    values |= as_inspected(LinearizedAttention, source)
    linearized = Made(f"Linearized{source.__name__}", (LinearizedAttention, source), values)
    linearized.made_by = attention_class, source
    return linearized


def swap_attention(model: nn.Module, path: str, config: PreTrainedConfig, mixer: MixerConfig) -> None:
    """Turn one attention module of a source into a linearized one, or give a linearized one another mixer.

    Args:
        model: the whole model; changed in place.
        path: of the module.
        config: of the whole model, with its `linearize` block.
        mixer: which, and its numbers.

    Raises:
        InputError: heads that stay softmax which the layer does not have, or all of them.
    """
    module: Any = model.get_submodule(path)
    layer = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(module, LinearizedAttention):
        if architectures.arch_of(config).drops_arguments:
            layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
        module.source_config = config
        module.rope = architectures.rope_of(module, config)
        module.config = copy.copy(module.config)
        transformers_api.set_attention(module.config, IMPLEMENTATION)
        module.__class__ = attention_class(type(module))
    reference = next(module.parameters())
    whole = architectures.reach(config, module.layer_idx) is None
    geometry = softmax_heads.others(architectures.geometry(config, module), mixer.softmax_heads, whole)
    module.mixer, module.softmax_heads = MIXERS[mixer.name](mixer, geometry).to(reference.device), mixer.softmax_heads


def _before_decoder(decoder: Any, args: tuple, kwargs: dict[str, Any]):
    """Once per forward: left-aligned rows for padding or packing; for a decoding step, what all layers do at once."""
    tokens = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
    T, past = tokens.shape[1], transformers_api.cache_of(kwargs)
    compiling = torch.compiler.is_compiling()
    if not tokens.is_floating_point() and not compiling:
        _check_ids(decoder, tokens)
    mask = kwargs.pop("linearize_mask", kwargs.get("attention_mask"))
    positions, rows = kwargs.get("position_ids"), None
    if isinstance(mask, dict):  # one for each type of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    whole = mask
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = F.pad(mask[:, -T:], (0, max(T - mask.shape[1], 0)))  # shorter: transformers leaves out what is not in it
        if not (compiling and T == 1 or host.read(mask.bool().all())[0]):
            rows = Rows.from_padding(mask)
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        rows = _rows_of(mask, past) if _mixes(decoder) and not compiling else None
    elif mask is None and positions is not None and T > 1 and not compiling:
        cached = past is not None or (decoder.config.use_cache if (use := kwargs.get("use_cache")) is None else use)
        rows = Rows.from_positions(positions.expand(tokens.shape[0], -1), restarts_only=bool(cached))
    elif mask is not None:
        raise InputError(
            f"attention_mask: found {type(mask).__name__}{list(getattr(mask, 'shape', []))}; expected [batch, tokens], "
            "0 for padding, or [batch, 1, tokens, tokens]"
        )
    _check_arguments(decoder, kwargs, rows)
    if getattr(past, "uneven", False) and not compiling:
        _check_rows(past, whole, positions, T)
    kwargs["linearize_rows"] = rows
    if isinstance(past, Cache):
        know_each_other(past.layers)
    if isinstance(past, Cache) and not compiling:
        settle({m.layer_idx: m.mixer for m in decoder.linearized if m.branch != "source"}, past.layers, T)
    # A compiler joins the layers' operations itself.
    if T == 1 and rows is None and isinstance(past, Cache) and not compiling:
        mixers = {m.layer_idx: m.mixer for m in decoder.linearized if m.branch != "source"}
        kwargs["linearize_steps"] = steps(mixers, past.layers)
    return args, kwargs


def _check_ids(decoder: Any, ids: Tensor) -> None:
    """Refuse ids that the embedding has no row for: an IndexError on the CPU, the end of the process on a GPU."""
    rows = decoder.get_input_embeddings().weight.shape[0]
    if ids.numel() and (host.is_free(ids) or ids.shape[1] > 1):
        lowest, highest = host.read(*ids.aminmax())
        if lowest < 0 or highest >= rows:
            raise InputError(
                f"input_ids: token {lowest if lowest < 0 else highest} has no row in the embedding, which has {rows} "
                "rows; tokenizer and model do not fit each other, or labels were given for tokens"
            )


def _mixes(decoder: Any) -> bool:
    return any(module.branch != "source" for module in decoder.linearized)


def _rows_of(mask: Tensor, past: Cache | None) -> Rows | Packed | None:
    layers = [layer for layer in past.layers if isinstance(layer, LinearizedCacheLayer)] if past is not None else []
    count = next((layer.tensors["count"] for layer in layers if layer.is_initialized), None)
    return Rows.from_mask(mask, 0 if past is None or count is None else int(past.get_seq_length()), count)


def _check_arguments(decoder: Any, kwargs: dict[str, Any], rows: Rows | Packed | None) -> None:
    """Refuse what softmax attention honours and a mixer cannot, with an InputError: it would be ignored in silence."""
    if not _mixes(decoder):
        return
    config = decoder.config
    wanted = kwargs.get("output_attentions")
    if config.output_attentions if wanted is None else wanted:
        raise InputError(
            "output_attentions: a linearized layer never makes attention weights, so there are none to return; "
            "leave it out, or ask the source model"
        )
    if kwargs.get("is_causal") is False or getattr(config, "is_causal", True) is False:
        raise InputError("is_causal=False: a recurrence reads from left to right only; leave it out, or use the source")
    documents = kwargs.get("cu_seq_lens_q")
    if documents is not None and len(documents) > 2 and (rows is None or rows.documents != len(documents) - 1):
        raise InputError(
            f"cu_seq_lens_q: names {len(documents) - 1} packed documents, and position_ids do not restart at each; "
            "give position_ids that do, and no attention_mask"
        )


def _check_rows(past: Any, mask: Any, positions: Any, new: int) -> None:
    """Refuse to go on from rows of different length as if they were of one, with an InputError."""
    counts = [layer.tensors["count"] for layer in past.layers if isinstance(layer, LinearizedCacheLayer)]
    folded = isinstance(mask, Tensor) and mask.ndim != 2  # compared in `_rows_of`
    fits = isinstance(mask, Tensor) and (folded or torch.equal(mask[:, :-new].sum(1).to(counts[0]), counts[0]))
    if positions is None or not fits:
        raise InputError(
            f"attention_mask: the rows of this cache have {counts[0].tolist()} tokens; give a mask [batch, tokens so "
            "far and new ones] with that many ones behind the padding of each row, and position_ids that count each "
            "row's own tokens (`generate` makes them of the mask)"
        )


def _before_layer(layer: Any, args: tuple, kwargs: dict[str, Any]):
    """Put what the attention needs on the mask, which every layer passes on."""
    arguments = {name: kwargs.pop(name) for name in ("linearize_rows", "linearize_steps") if name in kwargs}
    kwargs["attention_mask"] = _MaskWithArguments(kwargs.get("attention_mask"), arguments)
    return args, kwargs


def _after_decoder(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Finish the decoding step: what the new token will be remembered by, for all layers that are alike."""
    modules = {m.layer_idx: m for m in decoder.linearized}
    for step in dict.fromkeys(step for step, _ in kwargs.get("linearize_steps", {}).values()):
        step.finish(architectures.unrotate_layers([(modules[i], cos_sin) for i, cos_sin in step.positions.items()]))


def hook_decoder(model: Any) -> None:
    """Let the decoder of a model tell its linearized layers of padding and decoding steps, also after new ones came."""
    entered = architectures.arch_of(model.config).enters
    decoder: Any = model.get_submodule(entered) if entered else model.base_model
    if not hasattr(decoder, "linearized"):
        decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
        decoder.register_forward_hook(_after_decoder, with_kwargs=True)
    decoder.linearized = linearized_modules(model)


def linearized_modules(model: nn.Module) -> list[Any]:
    """All linearized attention modules, also below wrappers such as peft's."""
    return [m for m in model.modules() if isinstance(m, LinearizedAttention)]
