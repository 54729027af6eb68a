"""Whether a model can be linearized: the conversion's own promises, checked on the model itself.

Every check compares two runs of the same weights, so that random ones serve as well as trained ones. An architecture is
supported when a tiny model of it passes; `linearize archs` lists those that did. A conversion of any other tries a tiny
model first: if it fails, nothing is converted; where nothing can be tried, a warning says so.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from linearize.checkpoint.sources import load_source, locate, read_config
from linearize.errors import InputError
from linearize.model import architectures
from linearize.model.attention import linearized_modules
from linearize.model.branches import branches
from linearize.model.modeling import linearize_
from linearize.model.transformers_api import CACHE, CONFIG_MAPPING, cache_of

EXACT = 1e-6
"""Of the largest logit: the control runs the source's own kernels, most often bit for bit."""
CLOSE = 1e-5
"""Of the largest logit, fp32: sums in another order. Sources that round more in their own cache get as much."""
REACH = 1e-4

WIDTH, HEADS = 64, 4
# Names of sizes in transformers' configurations, made small enough for a forward pass of milliseconds.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 320),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH // 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), WIDTH // 2),
    "num_key_value_heads": HEADS // 2,
    "head_dim": WIDTH // HEADS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


ROLES = "LoRA roles"
"""The one check that a conversion can do without: it needs no adapters."""


@dataclass(frozen=True)
class Check:
    """One promise: its name, whether it holds, and what was measured or is missing."""

    name: str
    ok: bool
    detail: str


def shrink(config: PreTrainedConfig, layers: int = 6) -> PreTrainedConfig:
    """The same configuration with small sizes, and layers enough for every kind that it lists.

    Args:
        config: of any source; it stays as it is.
        layers: at least so many.

    Raises:
        ValueError, TypeError, KeyError: what the configuration's class says about sizes that do not fit it.
    """
    values = config.to_dict()
    kinds = values.get("layer_types") or []
    first = [kinds.index(kind) + 1 for kind in set(kinds)]
    layers = max(layers, *first) if first else layers
    # These two may be unset, which stands for what follows from the others; some classes cannot compute it.
    always = ("head_dim", "num_key_value_heads")
    small: dict[str, Any] = {
        key: size for key, size in _SIZES.items() if key in values and (key in always or values[key] is not None)
    }
    if values.get("num_key_value_heads") == values.get("num_attention_heads") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = HEADS
    small |= {key: layers for key in _DEPTHS if key in values}
    depths = {values[key] for key in _DEPTHS if key in values}
    # Whatever lists one thing per layer is cut to the layers that stay.
    small |= {key: v[:layers] for key, v in values.items() if isinstance(v, list) and len(v) in depths}
    for name in config.sub_configs:
        if isinstance(values.get(name), dict):
            small[name] = shrink(getattr(config, name), layers).to_dict()
    dropped = {"dtype", "transformers_version", "architectures", "_name_or_path"}
    return type(config)(**{key: v for key, v in (values | small).items() if key not in dropped})


def tiny(config: PreTrainedConfig) -> PreTrainedModel:
    """A random fp32 model of `shrink(config)`, the same at every call.

    Raises:
        InputError: no model can be made of it.
    """
    try:
        small = shrink(config)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(small).parameters())
        if size > 50e6:
            raise ValueError(f"it still has {size / 1e6:.0f} M parameters")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
            # The usual initialisation (0.02) makes attention nearly uniform; wider weights make errors in it visible.
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    torch.nn.init.normal_(parameter, std=0.15)
    except Exception as error:  # whatever a class of transformers says about sizes it was not made for
        raise InputError(
            f"model type {config.model_type!r}: no tiny model can be made of its configuration "
            f"({type(error).__name__}: {' '.join(str(error).split())}); give a folder with weights, without --tiny"
        ) from error
    return model.eval()


def probe(model: PreTrainedModel, window: int = 8, sinks: int = 2) -> list[Check]:
    """Check a source; it is left linearized.

    Args:
        model: a plain causal LM in evaluation mode.
        window: of the mixers that are tried; small, so that short texts reach beyond it.
        sinks: of the same mixers.

    Returns:
        One entry per promise, in the order tried; those after a failure of the first two are missing.

    Raises:
        InputError: its attention cannot be routed.
    """
    return _Probe(model, window, sinks).run()


class _Probe:
    def __init__(self, model: PreTrainedModel, window: int, sinks: int):
        self.model, self.window, self.sinks = model, window, sinks
        self.reach = window + sinks
        generator = torch.Generator().manual_seed(0)
        embeddings: Any = model.get_input_embeddings()
        shape = (2, max(40, 2 * self.reach))
        self.tokens = torch.randint(3, embeddings.weight.shape[0], shape, generator=generator).to(model.device)
        self.mask = torch.ones_like(self.tokens)
        self.mask[0, :9] = 0
        self.checks: list[Check] = []

    def logits(self, x: Tensor, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return self.model(x, **kwargs).logits.float()

    def pieces(self) -> Tensor:
        x, T, past, out = self.tokens, self.tokens.shape[1], None, []
        cuts = [0, 5, T - 6, *range(T - 5, T + 1)]
        for start, end in zip(cuts, cuts[1:], strict=False):
            with torch.no_grad():
                result = self.model(x[:, start:end], **{CACHE: past}, use_cache=True)
            past = cache_of(result)
            out.append(result.logits.float())
        return torch.cat(out, 1)

    def padded(self) -> Tensor:
        """The row with padding on its left, without it."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        return self.logits(self.tokens, attention_mask=self.mask, position_ids=positions)[0, 9:]

    def check(self, name: str, limit: float, measure: Callable[[], float]) -> bool:
        try:
            off = measure()
            self.checks.append(Check(name, off <= limit, f"{off:.1e} of the largest logit, at most {limit:.0e}"))
        except Exception as error:  # the source's own code failed on what it was given
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.checks.append(Check(name, False, said[:200]))
        return self.checks[-1].ok

    def run(self) -> list[Check]:
        model, x = self.model, self.tokens
        paths = architectures.attention_layers(model)
        names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        full, size = self.logits(x), 1.0
        size = float(full.abs().max())

        def away(a: Tensor, b: Tensor) -> float:
            return float((a - b).abs().max()) / size

        changed = x.clone()
        changed[:, -1] = 3 + (x[:, -1] - 2) % 200
        if not self.check("causal", CLOSE, lambda: away(self.logits(changed)[:, :-1], full[:, :-1])):
            return self.checks
        source = {"in pieces": self.pieces(), "padded": self.padded()}
        # Recurrent layers of the source, and routers of experts, round differently in each of these themselves.
        noise = 3 * max(away(source["in pieces"], full), away(source["padded"], self.logits(x[:1, 9:])[0]))
        close = max(CLOSE, noise)
        near = [self.logits(x[:, :n]) for n in range(1, self.reach + 1)]

        linearize_(model, {"name": "softmax"}, list(paths))
        same = names == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.checks.append(Check("names", same, f"{len(names)} tensors keep names and shapes" if same else "differ"))
        if not self.check("softmax control", EXACT, lambda: away(self.logits(x), full)):
            return self.checks
        self.check("softmax control, in pieces", EXACT, lambda: away(self.pieces(), source["in pieces"]))
        self.check("softmax control, padded", EXACT, lambda: away(self.padded(), source["padded"]))

        linearize_(model, {"name": "window", "window": self.window, "sinks": self.sinks}, list(paths))
        self.check("within reach", REACH, lambda: max(away(self.logits(x[:, : e.shape[1]]), e) for e in near))
        linearize_(model, {"name": "gla", "window": self.window, "sinks": self.sinks}, list(paths))
        self.check("memory, within reach", REACH, lambda: max(away(self.logits(x[:, : e.shape[1]]), e) for e in near))
        self.check("memory, in pieces", close, lambda: away(self.pieces(), self.logits(x)))
        self.check("memory, padded", close, lambda: away(self.padded(), self.logits(x[:1, 9:])[0]))
        self.check("source branch", EXACT, lambda: self.source_branch(full) / size)
        self.check("keys before RoPE", CLOSE, self.unrotated)
        self.check("generation with and without cache", 0, self.generated)
        self.roles()
        return self.checks

    def source_branch(self, full: Tensor) -> float:
        with branches(self.model, "source"):
            return float((self.logits(self.tokens) - full).abs().max())

    def unrotated(self) -> float:
        """What gates see in every layer, against the source's own forward of it with cos = 1 and sin = 0.

        Where the decoder layer gives no angles, all tokens of a layer's input are made the same: so must be its keys.
        """
        calls: list[Any] = []
        worst, modules = 0.0, linearized_modules(self.model)
        hooks = [m.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True) for m in modules]
        self.logits(self.tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        for module, args, kwargs in calls:
            x, kwargs = _by_name(module, args, kwargs)
            if kwargs.get("position_embeddings") is None:
                inputs = {name: each for name, each in kwargs.items() if getattr(each, "shape", None) == x.shape}
                same = {name: each[:, :1].repeat(1, x.shape[1], 1) for name, each in {"": x, **inputs}.items()}
                seen = _keys(module, same.pop(""), kwargs | same)
                expected = seen[:, :, :1]
            else:
                cos, sin = kwargs["position_embeddings"]
                still = {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
                seen, expected = _keys(module, x, kwargs), _keys(module, x, still)
            worst = max(worst, float((seen - expected).abs().max() / expected.abs().max()))
        return worst

    def generated(self) -> float:
        greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model: Any = self.model
        cached, plain = (
            model.generate(self.tokens, attention_mask=torch.ones_like(self.tokens), use_cache=use_cache, **greedy)
            for use_cache in (True, False)
        )
        return float((cached != plain).sum())

    def roles(self) -> None:
        played = {}
        for role in (*architectures.ROLES, "mlp"):
            try:
                played[role] = architectures.role_modules(self.model, [role])[0].rpartition(".")[2]
            except InputError:
                played[role] = "none"
        # Experts are fused into one parameter each: there is no module to put an adapter on.
        ok = "none" not in [played[role] for role in architectures.ROLES]
        self.checks.append(Check(ROLES, ok, ", ".join(f"{role}: {name}" for role, name in played.items())))


def _by_name(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states of a call of an attention module, and its other arguments by name."""
    kwargs = {**kwargs, **dict(zip(("hidden_states", *module.arguments), args, strict=False))}
    return kwargs.pop("hidden_states"), kwargs


def _keys(module: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The keys before RoPE that a mixer is told of in one call."""
    seen: list[Tensor] = []
    hook = module.mixer.register_forward_pre_hook(lambda mixer, args: seen.append(args[3].unrotate(args[1])))
    with torch.no_grad():
        module(x, **kwargs)
    hook.remove()
    return seen[0]


def failures(checks: list[Check]) -> str:
    """What does not hold, in one line; empty where all does."""
    return "; ".join(f"{check.name}: {check.detail}" for check in checks if not check.ok)


def text(checks: list[Check]) -> str:
    """The checks for a terminal, one per line."""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{'ok' if c.ok else 'FAILS':<6} {c.name:<{width}}  {c.detail}" for c in checks)


def probe_named(name: str, package: str | None = None, small: bool = False) -> list[Check]:
    """`probe` of a model by name.

    Args:
        name: folder, GGUF file or Hub id; with `small` also a model type of transformers.
        package: installed package that carries the model, see `linearize.checkpoint.sources.locate`.
        small: probe a tiny random model of the same configuration; no weights are read.

    Raises:
        InputError: it is not found, or its attention cannot be routed.
    """
    if small and name in CONFIG_MAPPING:
        return probe(tiny(CONFIG_MAPPING[name]()))
    located = locate(name, package=package)
    return probe(tiny(read_config(located)) if small else load_source(located, "float32")[0])


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse to convert what does not keep the promises; try what nobody has tried yet.

    A model type that passed the probe is taken, and one that failed it is refused. Of any other (one's own, or newer
    than this package) a tiny model is made and probed. Where that is not possible, a warning says so.

    Args:
        config: of the source.

    Raises:
        InputError: the model type fails the probe.
    """
    kind, known = config.model_type, architectures.record()
    if kind in known["passes"]:
        return
    why = known["fails"].get(kind) or _attempt_once(type(config), config.to_json_string(use_diff=False))
    if why.startswith(architectures.UNTRIED):
        warnings.warn(
            f"model type {kind!r}: nobody has shown that it converts exactly, and it cannot be tried here ({why}); "
            "`linearize archs --probe MODEL` checks the model itself",
            stacklevel=2,
        )
    elif why.startswith(ROLES):
        warnings.warn(f"model type {kind!r}: converts exactly, but cannot get adapters ({why})", stacklevel=2)
    elif why:
        raise InputError(
            f"model type {kind!r}: does not pass the probe ({why}); `linearize archs` lists what can, "
            "`linearize archs --probe MODEL` shows what is missing in another version of transformers"
        )


def attempt(make: Callable[[], PreTrainedConfig]) -> str:
    """The failures of a tiny model of a configuration, or why it cannot be tried; empty where all promises hold."""
    model = None
    try:
        model = tiny(make())
        return failures(probe(model))
    except InputError as error:
        return str(error).partition(": ")[2]
    except Exception as error:
        # Before it is linearized, it is the source's own code at sizes that it was not made for.
        why = "stops" if model and linearized_modules(model) else f"{architectures.UNTRIED} that runs"
        return f"{why} ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


@cache
def _attempt_once(cls: type[PreTrainedConfig], values: str) -> str:
    return attempt(lambda: cls.from_dict(json.loads(values)))
