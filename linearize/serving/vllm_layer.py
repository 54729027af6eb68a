"""vLLM's side of a linearized layer: the module that stands where `Attention` stood, its pages, its schedule."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..model.mixers import Context, Mixer
from . import pages
from .rotation import unrotate


class Builder(AttentionMetadataBuilder[Any]):
    """Makes the `Schedule` of a step from what vLLM knows on the CPU."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    reorder_batch_threshold: int | None = 1

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any):
        """The schedule of one step; arguments of vLLM's method."""
        starts = common_attn_metadata.query_start_loc_cpu
        lengths = starts.diff()
        seen = common_attn_metadata.seq_lens_cpu_upper_bound[: len(lengths)] - lengths
        table = common_attn_metadata.block_table_tensor[: len(lengths), 0]
        return pages.Schedule.of(lengths.tolist(), seen.tolist(), table)


class Backend(AttentionBackend):
    """What vLLM looks up for layers of this kind."""

    @staticmethod
    def get_name() -> str:
        """Under which vLLM registers it."""
        return "LINEARIZED"

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """Of the schedule."""
        return Builder

    @classmethod
    def is_ssm(cls) -> bool:
        """It keeps a state, and no keys and values by length."""
        return True


class LinearizedLayer(nn.Module, MambaBase):
    """Takes what vLLM's model hands to `Attention`, and returns what it would.

    Args:
        attention: the source's, of vLLM, whose place it takes.
        mixer: of the layer.
        rotary: the source's rotation; None where it has none.
        dtype: of keys and values.
    """

    def __init__(self, attention: Any, mixer: Mixer, rotary: nn.Module | None, dtype: torch.dtype):
        super().__init__()
        self.mixer, self.layer_name = mixer, attention.layer_name
        # Not a child: it stays where the source's model has it.
        object.__setattr__(self, "rotary", rotary)
        self.scaling = attention.impl.scale
        self.softcap = attention.impl.logits_soft_cap or None
        g = mixer.geometry
        self.shapes = (g.heads, g.key_width), (g.kv_heads, g.key_width), (g.kv_heads, g.value_width)
        self.layout = pages.layout(mixer, dtype)
        self.page_bytes = 0
        self.kv_cache: tuple[Tensor, ...] = ()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What vLLM's `Attention.forward` returns, [tokens, H·V].

        Args:
            query: [tokens, H·K].
            key: [tokens, G·K].
            value: [tokens, G·V].
            *args: of the output, which has no other shape here.
            **kwargs: the same.
        """
        output = query.new_empty(query.shape[0], self.shapes[0][0] * self.shapes[2][1])
        torch.ops.vllm.linearized_attention(query, key, value, output, self.layer_name)
        return output

    def attend(self, query: Tensor, key: Tensor, value: Tensor, schedule: "pages.Schedule | None") -> Tensor:
        """`forward` on the pages of the scheduled requests; without a schedule vLLM only looks at time and memory."""
        parts = [x.reshape(-1, *shape) for x, shape in zip((query, key, value), self.shapes, strict=True)]
        if schedule is None:
            positions = torch.arange(len(query), device=query.device)[None]
            q, k, v = (x.transpose(0, 1)[None] for x in parts)
            return self.mixer(q, k, v, self.context(None, positions))[0].transpose(0, 1).flatten(1)
        return pages.run(self.mixer, self.kv_cache, *parts, schedule, self.context).flatten(1)

    def context(self, cache: Any, positions: Tensor) -> Context:
        """What the mixer is called with.

        Args:
            cache: to continue and update, or None.
            positions: int64 [B, T], of the new tokens.
        """
        return Context(
            layer_idx=0,
            scaling=self.scaling,
            softcap=self.softcap,
            extra=None,
            unrotate=lambda x: unrotate(self.rotary, x, positions),
            rows=None,
            cache=cache,
            branch="all",
            attend=lambda q, k, v: v,
        )

    # --- the contract of vLLM

    @property
    def mamba_type(self) -> Any:
        """Which back end makes its schedule."""
        return MambaAttentionBackendEnum["LINEARIZED"]

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """One page for each request; all layers have pages of one size."""
        spec = super().get_kv_cache_spec(vllm_config)
        return replace(spec, page_size_padded=max(self.page_bytes, spec.page_size_padded or 0))

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Of the parts of a page."""
        return tuple(shape for shape, _ in self.layout)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Of the parts of a page."""
        return tuple(dtype for _, dtype in self.layout)


def _attend(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str) -> None:
    """One operation for a compiler, which looks into no mixer."""
    forward = get_forward_context()
    layer, metadata = forward.no_compile_layers[layer_name], forward.attn_metadata
    schedule = metadata[layer_name] if isinstance(metadata, dict) else None
    output.copy_(layer.attend(query, key, value, schedule))


def _attend_fake(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str) -> None:
    return None


OPERATION = "linearized_attention"
direct_register_custom_op(op_name=OPERATION, op_func=_attend, mutates_args=["output"], fake_impl=_attend_fake)
