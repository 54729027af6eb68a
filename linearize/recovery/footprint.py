"""What a training step holds in memory and computes, found by running it without values.

The code that runs is that of training itself, on tensors that have shapes and no content (torch's fake tensors); every
storage is counted from where it is made to where it is freed. So there is no second account of what a mixer, a loss or
a transformer layer keeps: what changes there, changes here. Small tensors whose values are known (positions, counts)
are computed, since code may ask for them; what nobody knows is 0, and one unknown number is above or below another
wherever that is asked (so a memory that has taken in tokens is full).

Not counted: what a library takes inside one operation, and what an allocator does not give back.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from linearize.checkpoint import adapters
from linearize.model import architectures
from linearize.recipe.schema import Stage
from linearize.recovery import optim
from linearize.recovery.head import logits_of, splits
from linearize.recovery.loop import prepare
from linearize.recovery.losses import likeliest, token_losses
from linearize.recovery.transfer import transfer

SMALL = 2**18
"""Elements of a tensor whose values are kept where they are known."""
_LIKE = {"new_zeros", "new_ones", "new_full"}
_ORDER = {"gt", "ge", "lt", "le"}


@dataclass(frozen=True)
class Footprint:
    """Of a training stage on one device, one micro batch a step.

    Attributes:
        weights: bytes of all weights, those of a source that is a model of its own included.
        trained: numbers that are trained, in fp32; their gradients are as large.
        optimiser: bytes of its state.
        source, student, backward, step: bytes beside weights and state, at most, in each part of a step: the source's
            forward pass; the student's, and the losses; the gradients; the optimiser.
        saved: bytes that the backward pass finds when it begins.
        flops: of matrix products and attention.
        operations: how many a micro batch is made of, each a launch on a GPU that does not fuse them.
    """

    weights: float
    trained: float
    optimiser: float
    source: float
    student: float
    backward: float
    step: float
    saved: float
    flops: float
    operations: float

    def stretched(self, other: "Footprint", share: float) -> "Footprint":
        """On the line through this one (share 0) and another (share 1), which may reach beyond both."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Footprint(*(a + share * (b - a) for a, b in pairs))

    def peak(self, accumulates: bool) -> float:
        """Bytes at most; `accumulates`: whether gradients of an earlier micro batch are there."""
        before = 4 * self.trained if accumulates else 0
        most = max(before + self.source, before + self.student, self.backward, self.step)
        return self.weights + self.optimiser + most


def footprint(build: Callable[[], PreTrainedModel], stage: Stage, divided: bool = False) -> Footprint:
    """Run a micro batch of a stage without values.

    A deep model is run with a few of its layers, twice; what a layer adds is the same for each that is like it.

    Args:
        build: makes the linearized model on the meta device.
        stage: with its micro_batch, seq_len and all that it learns.
        divided: whether weights are divided over processes, so that all logits are made at once.
    """
    model = build()
    kinds = _kinds(model)
    period = next((p for p in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))), 0)
    few, more = max(2, period), 2 * max(2, period)
    if not period or more >= len(kinds):
        return _run(build, stage, divided)
    first, second = (_run(lambda d=depth: _cut(build(), d), stage, divided) for depth in (few, more))
    return first.stretched(second, (len(kinds) - few) / (more - few))


def _kinds(model: Any) -> list[tuple]:
    """What tells layers apart: their mixer with its settings, and how far their attention reaches."""
    config, made = model.config, model.config.linearize["layers"]
    depth = config.get_text_config().num_hidden_layers
    return [(repr(made.get(str(i))), architectures.reach(config, i)) for i in range(depth)]


def _cut(model: Any, depth: int) -> Any:
    """The model with its first layers only."""
    path = next(iter(architectures.attention_layers(model).values()))
    name = path[: next(i for i in range(len(path)) if path[i:].partition(".")[0].isdecimal())].rstrip(".")
    layers: Any = model.get_submodule(name)
    del layers[depth:]
    model.config.get_text_config().num_hidden_layers = depth
    made = model.config.linearize["layers"]
    model.config.linearize["layers"] = {i: values for i, values in made.items() if int(i) < depth}
    decoder = model.get_submodule(architectures.arch_of(model.config).enters or model.base_model_prefix)
    decoder.linearized = [module for module in decoder.linearized if module.layer_idx < depth]
    return model


def _run(build: Callable[[], Any], stage: Stage, divided: bool) -> Footprint:
    kept, compute = adapters.keeps_source(stage.peft), getattr(torch, stage.dtype)
    student, teacher = prepare(build().to(compute if kept else torch.float32), stage), None
    if not kept and (stage.kl or stage.transfer):
        teacher = build().requires_grad_(False).to(compute)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in filter(None, (student, teacher)):
            model.to_empty(device="cpu")
            getattr(model, "get_base_model", lambda m=model: m)().tie_weights()
        optimizer, _ = optim.build(student, stage, 1)
        ids = torch.zeros(stage.micro_batch, stage.seq_len, dtype=torch.int64)
        held = [ids, *(x for each in {student, teacher or student} for x in (*each.parameters(), *each.buffers()))]
        with _Fused(watch := _Watch(held)), watch:
            for each in {student, teacher or student}:
                splits(each, ids, lambda: _autocast(stage))
            watch.forget()
            _step(student, teacher or student, ids, stage, watch.next, divided)
            flops, operations = watch.flops, watch.operations
            watch.next("step")
            optimizer.step()
            optimizer.zero_grad()
    weights = sum(w.nbytes for each in {student, teacher or student} for w in each.parameters())
    source, learner, backward = (watch.peaks.get(name, 0) for name in ("source", "student", "backward"))
    step = watch.peaks["step"] - watch.live  # the state is there in every step but the first
    trained = sum(w.numel() for w in student.parameters() if w.requires_grad)
    return Footprint(
        weights, trained, watch.live, source, learner, backward, step, watch.saved, flops, operations
    )  # fmt: skip


def _step(
    student: Any, teacher: Any, ids: Tensor, stage: Stage, next_part: Callable[[str], None], divided: bool
) -> None:  # fmt: skip
    """The micro batch of `Loop.losses`, without processes."""

    @contextmanager
    def as_source() -> Iterator[None]:
        with _autocast(stage), adapters.as_source(teacher):
            yield

    def logits(model: Any, inside: Callable[[], Any], **keep: int) -> Any:
        if divided or keep:
            with inside():
                return model(input_ids=ids, use_cache=False, **keep).logits
        return logits_of(model, ids, inside=inside)

    source = None
    hooks = transfer(teacher, student, lambda error: error.backward()) if stage.transfer else nullcontext()
    with hooks:
        if stage.kl:
            source = logits(teacher, as_source)
            source = likeliest(source, stage.top_k) if stage.top_k else source
        elif stage.transfer:
            logits(teacher, as_source, logits_to_keep=1)
    if stage.lm or stage.kl:
        next_part("student")
        made = logits(student, lambda: _autocast(stage))
        losses = token_losses(made, ids, source, lm=stage.lm, kl=stage.kl, temperature=stage.temperature)
        del source, made
        next_part("backward")
        losses.total.backward()


def _autocast(stage: Stage) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=stage.dtype == "bfloat16")


class _Watch(TorchDispatchMode):
    """Bytes of the storages that live, their peak in each part of the run, and what is computed."""

    def __init__(self, held: Iterable[Tensor]):
        super().__init__()
        self.live = 0
        self.forget()
        self._known = WeakIdKeyDictionary({tensor.untyped_storage(): 0 for tensor in held})  # counted by others

    def forget(self) -> None:
        """Begin anew, with what lives."""
        self.part, self.peaks, self.saved = "source", {"source": self.live}, 0
        self.flops = self.operations = 0

    def next(self, part: str) -> None:
        self.part, self.peaks[part] = part, self.live
        if part == "backward":
            self.saved = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "_local_scalar_dense":
            if isinstance(given[0], FakeTensor):
                return {torch.bool: False}.get(given[0].dtype, 0.0 if given[0].is_floating_point() else 0)
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "allclose":  # whether a head can be run alone: where it can be tried, it can
            return True
        if name in _LIKE and isinstance(given[0], FakeTensor) and math.prod(args[1]) <= SMALL:
            with unset_fake_temporarily():
                out = func(torch.empty(0, dtype=given[0].dtype), *args[1:], **kwargs)
        else:
            out = self._of_known(func, args, kwargs, given)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.operations += torch.Tag.inplace_view not in func.tags and not _is_view(func)
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _of_known(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """The result with values, where all that it is made of has some and it is small; else without."""
        known = not any(isinstance(x, FakeTensor) or x.numel() > SMALL for x in given)
        blank, blank_kwargs = tree_map(_without_values, (args, kwargs))
        if known and "empty" not in func.overloadpacket.__name__:
            size = 0
            if not func._schema.is_mutable:
                made = tree_leaves(func(*blank, **blank_kwargs))
                size = sum(x.numel() for x in made if isinstance(x, Tensor))
            if size <= SMALL:
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        made = func(*blank, **blank_kwargs)
        if func.overloadpacket.__name__ in _ORDER and made.numel() <= SMALL:
            with unset_fake_temporarily():
                return torch.ones(made.shape, dtype=torch.bool)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            self.live += size
            self.peaks[self.part] = max(self.peaks[self.part], self.live)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _without_values(x: Any) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def _is_view(func: Any) -> bool:
    return any(arg.alias_info is not None and not arg.alias_info.is_write for arg in func._schema.arguments)


class _Attention(torch.autograd.Function):
    """Attention as fused kernels run it: its scores are never there."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _Fused(TorchFunctionMode):
    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            rest = ("query", "key", "value")[len(args) :]
            given: list[Any] = [*args, *((kwargs or {}).get(name) for name in rest)]
            q, k, v = given[:3]
            once = 2 * q.numel() * k.shape[-2]  # two products, half of which is masked
            self.watch.flops += once * (3.5 if torch.is_grad_enabled() and q.requires_grad else 1)
            return _Attention.apply(q, k, v)
        return func(*args, **(kwargs or {}))
