"""Class surgery: any transformers causal LM becomes a linearized one, with its own code, weights and names.

`linearize_` swaps the class of each attention module for a subclass that keeps the source's forward (projections,
biases, norms, RoPE, output projection) and routes the attention function inside it to a mixer. `LinearizedConfig` and
`LinearizedForCausalLM` are made on demand as subclasses of the source's own classes and registered with the Auto
classes, so that a saved folder opens with plain `AutoModelForCausalLM.from_pretrained` after `import linearize`.
Nothing here names an architecture.
"""

from functools import cache
from threading import RLock
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import InputError
from . import architectures, transformers_api
from . import cache as caches
from .assisting import BoundedDrafts
from .attention import hook_decoder, linearized_modules, swap_attention
from .cache import cache_layer
from .made import Made, as_inspected
from .mixers import MixerConfig, build_config, read_config
from .transformers_api import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, conversion_rules, name_of

FORMAT = 1
"""Version of the `linearize` block in config.json."""

_home: dict[str, str | None] = {"module": __name__, "config": None, "model": None}
"""Where saving looks for the classes: their module, and the Auto classes that the saved code is registered with."""
_making = RLock()
# Mixed-in classes rely on the source's class that follows them, which a type checker cannot know.
_Source: Any = object


# --- factories


class LinearizedConfig(PreTrainedConfig):
    """Opens the config.json of a linearized folder: a subclass of the source's own configuration, made on demand."""

    model_type = "linearized"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """The configuration that a config.json holds, of the source's own class.

        Args:
            config_dict: content of the file, with its `linearize` block.
            **kwargs: of the source's `from_dict`.

        Raises:
            InputError: no complete `linearize` block, a newer format, an unknown mixer or an unknown source.
        """
        block = config_dict.get("linearize")
        if not isinstance(block, dict) or "source" not in block or "layers" not in block:
            raise InputError(
                "config.json: model_type is 'linearized' but there is no complete `linearize` block; "
                "expected format, source and layers; convert the source again"
            )
        if block.get("format", 0) > FORMAT:
            raise InputError(
                f"config.json: linearize.format is {block['format']}; this version reads up to {FORMAT}; "
                "upgrade linearize"
            )
        for values in block["layers"].values():
            read_config(values)
        source = block["source"]["model_type"]
        if source not in CONFIG_MAPPING:
            raise InputError(
                f"config.json: linearize.source.model_type is {source!r}, which this version of "
                "transformers does not know"
            )
        transformers_api.offer(LinearizedForCausalLM)
        return config_class(CONFIG_MAPPING[source]).from_dict(config_dict, **kwargs)


def config_class(source: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The linearized subclass of a source's configuration class, registered together with its model class."""
    with _making:  # one class per source, also when two threads ask at once
        return _config_class(source)


@cache
def _config_class(source: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    # One __name__ for all, because saving and registering compare names; a distinct __qualname__, because registries of
    # recorded outputs are keyed by it.
    names: dict[str, Any] = {"__module__": _home["module"], "__qualname__": f"LinearizedConfig[{source.model_type}]"}
    names["_auto_class"] = _home["config"]
    linearized = Made("LinearizedConfig", (source,), {"model_type": "linearized", **names})
    linearized.made_by = config_class, source
    model = MODEL_FOR_CAUSAL_LM_MAPPING[source]
    AutoModelForCausalLM.register(linearized, model_class(model, linearized), exist_ok=True)
    return linearized


class LinearizedForCausalLM(_Source):
    """Mixed into the source's causal LM class; `AutoModelForCausalLM.from_pretrained` returns such a model.

    Attributes:
        source_class: the source's causal LM class; None in this class alone, which has none.
    """

    source_class: ClassVar[Any] = None
    config: Any

    @property
    def _is_stateful(self) -> bool:
        """Whether assisted generation is out of the question, because some layer cannot take tokens back."""
        return not all(module.mixer.late or module.mixer.keeps_source_cache for module in linearized_modules(self))

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        paths = architectures.attention_layers(self)
        for index, values in config.linearize["layers"].items():
            swap_attention(self, paths[int(index)], config, read_config(values))
        hook_decoder(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any):
        """Open a linearized folder.

        Args:
            *args: of transformers' method, the folder or Hub id first.
            output_loading_info: return what was read beside the model.
            **kwargs: of transformers' method.

        Returns:
            The model, or the model and what was read.

        Raises:
            InputError: tensors are missing, left over, or of another shape than config.json asks for.
        """
        if cls.source_class is None:
            return AutoModelForCausalLM.from_pretrained(*args, output_loading_info=output_loading_info, **kwargs)
        with conversion_rules(cls.__name__, cls.source_class):
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {k: sorted(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(k)}
        if wrong:
            problems = "; ".join(
                f"{k.replace('_', ' ')}: {', '.join(map(str, v[:5]))} ({len(v)})" for k, v in wrong.items()
            )
            raise InputError(f"{args[0]}: the tensors do not fit its config.json: {problems}; convert the source again")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the folder with the source's own tensor names; arguments of transformers' method."""
        with conversion_rules(type(self).__name__, self.source_class):
            super().save_pretrained(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter whose tensors have the source's own names; arguments of transformers' method."""
        with conversion_rules(type(self).__name__, self.source_class):
            return super().load_adapter(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """Refuse it.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching pages a softmax cache, which a linearized model does not have; use `generate` with a "
            "padded batch"
        )

    def prepare_inputs_for_generation(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any):
        """The source's inputs of one step, and the padding.

        Args:
            *args: of the source's method.
            attention_mask: [B, tokens so far], 0 for padding.
            **kwargs: of the source's method.

        Returns:
            Arguments of `forward`.
        """
        inputs = super().prepare_inputs_for_generation(*args, attention_mask=attention_mask, **kwargs)
        # With a static cache the padding is already folded into a 4-D mask, where rows of real tokens cannot be seen
        # any more.
        if attention_mask is not None and inputs.get("attention_mask") is not attention_mask:
            inputs["linearize_mask"] = attention_mask
        return inputs

    def _get_candidate_generator(self, *args: Any, **kwargs: Any):
        return BoundedDrafts(super()._get_candidate_generator(*args, **kwargs))

    def _prepare_generated_length(self, generation_config, *args: Any, input_ids_length: int, **kwargs: Any):
        # As a draft, too: what it writes at a time may all have to go.
        prepared = super()._prepare_generated_length(
            generation_config, *args, input_ids_length=input_ids_length, **kwargs
        )
        if prepared.is_assistant:
            prepared.max_length = min(prepared.max_length, input_ids_length + caches.ROLLBACK)
        return prepared

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args: Any, **kwargs: Any):
        # Layers are swapped before the first step: a static cache would otherwise answer for the masks as if it were
        # softmax.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        past = transformers_api.cache_of(model_kwargs)
        if past is not None and not self.training:
            depth = self.config.get_text_config().num_hidden_layers  # fewer while a model drafts by early exit
            for module in linearized_modules(self):
                runs = module.layer_idx < depth and module.branch != "source"
                if runs and not module.mixer.keeps_source_cache:
                    mixer, grows = module.mixer, bool(module.softmax_heads)
                    layer = cache_layer(past, module.layer_idx, mixer.window, mixer.sinks, grows, mixer.late)
                    if generation_config.is_assistant:
                        layer.activate_past_recording()


@cache
def model_class(source: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The linearized subclass of a source's causal LM class.

    Args:
        source: the source's class.
        config: the linearized configuration class that belongs to it.
    """
    names: dict[str, Any] = {"__module__": _home["module"], "__qualname__": f"LinearizedForCausalLM[{source.__name__}]"}
    names |= {"_auto_class": _home["model"], "config_class": config, "source_class": source}
    names |= as_inspected(LinearizedForCausalLM, source)
    linearized = Made("LinearizedForCausalLM", (LinearizedForCausalLM, source), names)
    linearized.made_by = model_class, source, config
    return linearized


AutoConfig.register("linearized", LinearizedConfig, exist_ok=True)


def live_in(module: str) -> None:
    """Let the classes belong to a file that a folder brings along (checkpoint/remote_code.py): what is saved by them
    takes that file along again.

    Args:
        module: name of the imported file.
    """
    _home.update(module=module, config="AutoConfig", model="AutoModelForCausalLM")
    LinearizedConfig.__module__ = LinearizedForCausalLM.__module__ = module


# --- verbs


def linearize_(
    model: PreTrainedModel,
    mixer: MixerConfig | dict[str, Any],
    layers: list[int] | None = None,
    source: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Replace the attention of a causal LM by a mixer, in place; the weights stay where they are.

    Args:
        model: a source model, or a linearized one, whose named layers then get another mixer.
        mixer: which, and its numbers.
        layers: indices of the layers to replace; None means those whose attention sees the whole text: sliding-window
            layers stay, unless the source has no others.
        source: where the weights came from (id, revision, path, …), stored in the configuration.

    Returns:
        The same object.

    Raises:
        InputError: a layer out of range, an unknown mixer, or an architecture whose attention cannot be routed.

    Example:
        >>> linearize_(model, {"name": "gla", "window": 64, "sinks": 4})
    """
    config = build_config(mixer) if isinstance(mixer, dict) else mixer
    paths = architectures.attention_layers(model)
    chosen = architectures.check_layers(paths, layers, model.config)
    block = getattr(model.config, "linearize", None)
    if block is None:
        origin = {"model_type": model.config.model_type, "id": name_of(model.config), **(source or {})}
        model.config.__class__ = config_class(type(model.config))
        model.__class__ = model_class(type(model), type(model.config))
        model.config.linearize = block = {"format": FORMAT, "source": origin, "layers": {}}
        model.config.architectures = ["LinearizedForCausalLM"]
    for index in chosen:
        swap_attention(model, paths[index], model.config, config)
        block["layers"][str(index)] = config.to_dict()
    block["layers"] = {str(i): block["layers"][str(i)] for i in sorted(map(int, block["layers"]))}
    hook_decoder(model)
    return model
