"""What a conversion will do, from the configuration alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from linearize.checkpoint import budget, fit, shards
from linearize.checkpoint.describe import cache_sizes
from linearize.checkpoint.room import check_memory
from linearize.checkpoint.sources import Located, read_config
from linearize.conversion import probe
from linearize.formats import format_bytes, recording
from linearize.model import architectures
from linearize.model.attention import linearized_modules
from linearize.model.mixers import build_config
from linearize.model.modeling import linearize_
from linearize.model.sizes import state_bytes, text_sizes
from linearize.recipe.schema import Recipe


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, from the configuration alone.

    Attributes:
        source: id, model_type and where it is.
        mixer: name and settings.
        layers: layers that get the mixer.
        kept: attention layers that stay softmax.
        parameters: of the source.
        new_parameters: that the mixers add.
        dtype: of the converted weights; ``auto`` means as stored.
        cache: bytes of cache of one row by context length, for the source and the converted model: see `cache_sizes`.
        later: what training and evaluation by this recipe would refuse; looked for where the plan is all that is asked.
    """

    source: dict[str, Any]
    mixer: dict[str, Any]
    layers: list[int]
    kept: list[int]
    parameters: int
    new_parameters: int
    dtype: str
    cache: dict[str, Any]
    later: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return asdict(self)

    def text(self) -> str:
        """The plan for a terminal, one fact per line."""
        settings = ", ".join(f"{key} {value}" for key, value in self.mixer.items() if key != "name")
        at_32k = next(row for row in self.cache["contexts"] if row["context"] == 32768)
        share = at_32k["linearized"] / at_32k["source_kv"]
        growth = self.cache["bytes_per_token"]
        rows = {
            "source": f"{self.source['id']} ({self.source['model_type']}{', GGUF' if self.source['gguf'] else ''})",
            "mixer": f"{self.mixer['name']} ({settings})",
            "layers": f"{len(self.layers)} of {len(self.layers) + len(self.kept)} linearized"
            + (f"; softmax stays in {', '.join(map(str, self.kept))}" if self.kept else ""),
            "weights": f"{self.parameters / 1e6:,.1f} M, {self.new_parameters:,} new; dtype {self.dtype}",
            "cache per token": f"{format_bytes(growth['linearized'])} (source {format_bytes(growth['source_kv'])})",
            "cache at 32K": f"{format_bytes(at_32k['linearized'])} (source {format_bytes(at_32k['source_kv'])}), "
            f"{share:.1%}" + recording(self.cache),
        }
        lines = [*rows.items(), *(("refused later", problem) for problem in self.later)]
        return "\n".join(f"{name:<16} {value}" for name, value in lines)


def plan(located: Located, recipe: Recipe) -> Plan:
    """Work out what a conversion would do. Reads the source's configuration, and headers of weights that are here.

    Args:
        located: the source, from `linearize.checkpoint.sources.locate`.
        recipe: its `convert` part names mixer, layers and dtype.

    Returns:
        The plan.

    Raises:
        InputError: unreadable configuration, unsupported architecture, wrong mixer settings, or a layer out of range.
    """
    if not located.gguf and located.revision is None and shards.has_safetensors(located.path):
        fit.check(located.path, build_source(located), shards.read_folder(located.path))
    return _plan(build(located, recipe), located, recipe)


def _plan(model: PreTrainedModel, located: Located, recipe: Recipe) -> Plan:
    linearized = sorted(map(int, model.config.linearize["layers"]))
    new = new_tensors(model)
    return Plan(
        source={"model_type": model.config.linearize["source"]["model_type"], **located.to_dict()},
        mixer=next(iter(model.config.linearize["layers"].values())),
        layers=linearized,
        kept=[layer for layer in architectures.attention_layers(model) if layer not in linearized],
        parameters=sum(parameter.numel() for name, parameter in model.named_parameters() if name not in new),
        new_parameters=sum(tensor.numel() for tensor in new.values()),
        dtype=recipe.convert.dtype,
        cache=cache_sizes(model.config),
    )


def build_source(located: Located) -> PreTrainedModel:
    """The source without values (meta device): its names, shapes and configuration."""
    config = read_config(located)
    config._name_or_path = ""
    config.__dict__.pop("_model_name_or_path", None)  # a GGUF file's title is not needed
    return fit.empty(config, located.id)


def build(located: Located, recipe: Recipe) -> PreTrainedModel:
    """The linearized model without values (meta device)."""
    model = build_source(located)
    probe.check_supported(model.config)
    layers, paths = recipe.convert.layers, architectures.attention_layers(model)
    if isinstance(layers, Mapping):
        kept = architectures.check_layers(paths, layers["keep"], model.config)
        layers = [layer for layer in architectures.full_layers(paths, model.config) if layer not in kept]
    chosen = {"full": None, "all": list(paths)}.get(layers, layers) if isinstance(layers, str) else layers
    mixer = recipe.convert.mixer
    linearize_(model, mixer, chosen, source=located.to_dict())
    _check_window(model, mixer)
    if recipe.convert.cache is not None:
        mixer = budget.sized(model.config, mixer, recipe.convert.cache)
        linearize_(model, mixer, chosen, source=located.to_dict())
    return model


def _check_window(model: PreTrainedModel, mixer: dict[str, Any]) -> None:
    """Refuse a window that no machine holds the cache of; one that is wider than the text can be is waste enough."""
    config, context = build_config(mixer), text_sizes(model.config).context
    window = config.window + config.sinks
    if context is not None and window > context:
        where = f"convert.mixer.window: {window:,} tokens with sinks (the model's context is {context:,}); one row"
        check_memory(state_bytes(model.config, 1)["linearized"], where, f"a window of {context:,} sees everything")


def new_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Initial values of the weights that the mixers of a model on the meta device add, by their full names."""
    names = {id(module): name for name, module in model.named_modules()}
    new = {}
    for module in linearized_modules(model):
        mixer = type(module.mixer)(module.mixer.config, module.mixer.geometry)
        new |= {f"{names[id(module)]}.mixer.{name}": tensor for name, tensor in mixer.state_dict().items()}
    return new
