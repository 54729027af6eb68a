"""flash-linear-attention's own Triton kernels on CPU tensors, by Triton's interpreter. Import it before triton and fla.

It changes triton and fla, and nothing of linearize:

- Autotuners take their first configuration: there is no GPU to time one on.
- `range` in modules of kernels gives integers that have `.to`, which kernels call on loop variables.
- bf16, which the interpreter keeps as bits in uint16 and multiplies as such, goes through fp32 and is rounded to
  nearest even, as on a GPU. (Untreated, anything in bf16 is off by 1e9.)
- Inside `tf32()`, operands of fp32 products are rounded to TF32 as `tl.dot` does on an NVIDIA GPU.

Compiled code, races, shared memory and other configurations are not covered. It replaces internals of triton 3.9.0.
"""

import builtins
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import autotuner, interpreter  # noqa: E402

FAMILIES = ("gla", "simple_gla", "delta_rule", "gated_delta_rule", "kda", "gsa")
"""Modules of fla.ops that linearize calls."""
_HOLDS_KERNELS = ("Autotuner", "CachedAutotuner", "Heuristics", "InterpretedFunction")
_rounds_to_tf32 = False


@contextmanager
def tf32() -> Iterator[None]:
    """fp32 products in TF32 for a while."""
    global _rounds_to_tf32
    _rounds_to_tf32 = True
    try:
        yield
    finally:
        _rounds_to_tf32 = False


def load() -> None:
    """Import fla's kernels and make the interpreter fit for them."""
    autotuner.Autotuner._bench = lambda self, *args, config=None, **kwargs: [1.0, 1.0, 1.0]
    for name in FAMILIES:
        importlib.import_module(f"fla.ops.{name}")
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops") and any(type(x).__name__ in _HOLDS_KERNELS for x in vars(module).values()):
            vars(module).setdefault("range", _range)
    builder, reduce = interpreter.InterpreterBuilder, interpreter.ReduceOps
    for name, made in (
        ("binary_op", _binary), ("unary_op", _unary), ("cast_impl", _cast), ("create_fp_to_fp", _cast),
        ("create_dot", _dot),
    ):  # fmt: skip
        setattr(builder, name, made(getattr(builder, name)))
    reduce.sum, reduce.min_max = _reduction(reduce.sum), _reduction(reduce.min_max)


class _Index(int):
    def to(self, dtype: Any, **kwargs: Any) -> "_Index":
        return self


def _range(*args: Any) -> Iterator[_Index]:
    def plain(x: Any) -> int:
        return int(x.handle.data.item()) if hasattr(x, "handle") else int(getattr(x, "value", x))

    return map(_Index, builtins.range(*map(plain, args)))


# --- numbers


def _wide(bits: np.ndarray) -> np.ndarray:
    """Bits of bf16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(x: np.ndarray) -> np.ndarray:
    """fp32 -> bits of bf16, to nearest even."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _as_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 -> fp32 with 10 bits of mantissa, to nearest, ties away from zero (cvt.rna)."""
    return ((np.ascontiguousarray(x).view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(x: Any) -> bool:
    return x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _handle(x: np.ndarray, dtype: Any = tl.bfloat16) -> Any:
    return interpreter.TensorHandle(_narrow(x) if dtype == tl.bfloat16 else x, dtype)


# --- operations of the interpreter, given those that they replace


def _binary(plain: Callable) -> Callable:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (_is_bf16(lhs) and _is_bf16(rhs)) or op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return plain(self, lhs, rhs, op)
        out = op(_wide(lhs.data), _wide(rhs.data))
        return _handle(out, lhs.dtype.scalar) if out.dtype != np.bool_ else interpreter.TensorHandle(out, tl.bfloat16)

    return binary_op


def _unary(plain: Callable) -> Callable:
    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return _handle(op(_wide(arg.data))) if _is_bf16(arg) else plain(self, arg, op)

    return unary_op


def _cast(plain: Callable) -> Callable:
    def cast(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return plain(self, src, dst_type, *rounding)
        x = _wide(src.data) if source == tl.bfloat16 else src.data.astype(np.float32)
        return _handle(x if target == tl.bfloat16 else x.astype(interpreter._get_np_dtype(dst_type)), target)

    return cast


def _dot(plain: Callable) -> Callable:
    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        asked = getattr(input_precision, "name", str(input_precision)).upper().endswith("TF32")

        def operand(x: Any) -> np.ndarray:
            if _is_bf16(x):
                return _wide(x.data)
            if x.data.dtype == np.float16:
                return x.data.astype(np.float32)
            return _as_tf32(x.data) if _rounds_to_tf32 and asked and x.data.dtype == np.float32 else x.data

        out = np.matmul(operand(a), operand(b))
        if _is_bf16(d):
            return _handle(out + _wide(d.data))
        return interpreter.TensorHandle((out + d.data).astype(d.data.dtype), d.dtype.scalar)

    return create_dot


def _reduction(plain: Callable) -> Callable:
    """Sums, maxima and minima of bf16 numbers, not of their bits."""

    def narrow(self: Any, part: Any) -> Any:
        if part.dtype.scalar == tl.int32:  # where the maximum is
            return self.to_tensor(part.handle.data, tl.int32)
        block = isinstance(part.type, tl.block_type)
        return tl.core.tensor(
            _handle(np.asarray(part.handle.data)), tl.block_type(tl.bfloat16, part.type.shape) if block else tl.bfloat16
        )

    def over(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        first = x[0] if isinstance(x, tuple) else x
        if first.dtype.scalar != tl.bfloat16:
            return plain(self, x, *args, **kwargs)
        out = plain(self, self.to_tensor(_wide(first.handle.data), tl.float32), *args, **kwargs)
        return tuple(narrow(self, part) for part in out) if isinstance(out, tuple) else narrow(self, out)

    return over
