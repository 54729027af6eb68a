"""The Triton kernels of clusters as a GPU's compiler takes them, without a GPU: what the interpreter does not show.

    bash scripts/check_kernels.sh --compile

Every launch of a block, its gradient and a step is compiled down to the binary for each architecture, as
clusters_backend.py would launch it. That it runs, and how fast, needs the GPU. Writes
eval/results/check-kernels-compiled.json, and a table beside it.
"""

import argparse
from collections.abc import Iterator
from typing import Any
from unittest import mock

import bench_common as common
import torch
import triton  # pyright: ignore[reportMissingImports]
from bench_common import Cell
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from linearize.model.ops import clusters, clusters_backend, compact

TARGETS = {"A100": 80, "H100": 90}
"""GPU -> its compute capability."""
SIZES = ((704, 88, 64, 64), (464, 58, 128, 128), (40, 5, 20, 20))
"""M, C, K and V: SmolLM2's in int4, an 8B model's, and ones that are no powers of two."""
OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid")
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32"}


def compiled(kernel: Any, given: tuple[Any, ...], constants: dict[str, Any], capability: int) -> dict[str, int]:
    """Bytes of shared memory and of the binary of a kernel that gets these arguments and constants."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    types = iter(POINTERS[x.dtype] if isinstance(x, torch.Tensor) else "i32" if isinstance(x, int) else "fp32"
                 for x in given)  # fmt: skip
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else next(types) for name in names}
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": made.metadata.shared, "binary": len(made.asm["cubin"])}


def launched(M: int, C: int, K: int, V: int, dtype: torch.dtype | None) -> Iterator[tuple[str, Any, Any]]:
    """Name, arguments and constants of what is launched for a block with a gradient and for a step."""
    calls: list[tuple[str, Any, Any]] = []

    def note(name: str, grid: Any, *given: Any, **constants: Any) -> None:
        calls.append((name, given, constants))

    rule = clusters.Rule(C, 0.3, 0.0, 3, K**-0.5)
    state = clusters.initial_state(1, 3, K, V, M, torch.device("cpu"), dtype)
    block = (torch.zeros(1, 3, *shape) for shape in ((M, K + V), (M, 2), (2 * C, K + V), (2 * C, 2), (3, 2 * K)))
    centre = torch.zeros(1, 3, 1, K + V) if dtype == torch.uint8 else None
    with mock.patch.multiple(clusters_backend, _launch=note, _at_once=lambda device: 132):
        goes_on = torch.ones(1, 2, dtype=torch.bool)
        every, counts, went = clusters_backend.merges(*block, goes_on, rule, dtype, centre)
        clusters_backend.gradient(every, counts, went, C)
        clusters_backend.take_in(*(torch.zeros(1, 3, 1, width) for width in (K, V, 1)), state, rule)
        clusters_backend.read_token(torch.zeros(1, 9, 1, K), state, rule)
    yield from calls


def cells() -> Iterator[Cell]:
    """Every kernel, for every GPU, size and dtype."""
    for gpu, capability in TARGETS.items():
        for M, C, K, V in SIZES:
            for name, dtype in compact.DTYPES.items():
                for kernel, given, constants in launched(M, C, K, V, dtype):
                    cell = {"gpu": gpu, "clusters": M, "key": K, "value": V, "dtype": name, "kernel": kernel}
                    yield cell | compiled(getattr(clusters_backend._kernels(), kernel), given, constants, capability)


def markdown(results: dict[str, Any]) -> list[str]:
    """A row per kernel and size, a column per GPU and dtype: the shared memory that it takes."""
    made = results["cells"]
    rows = dict.fromkeys((c["kernel"], c["clusters"], c["key"], c["value"]) for c in made)
    columns = dict.fromkeys((c["gpu"], c["dtype"]) for c in made)
    shared = {tuple(c[x] for x in ("kernel", "clusters", "key", "value", "gpu", "dtype")): c["shared"] for c in made}
    return [
        f"The kernels of clusters compiled to binaries by triton {triton.__version__}, without a GPU, commit "
        f"{results['environment']['commit']}: bytes of shared memory.",
        *common.table(
            ("kernel", "clusters", "key", "value", *(f"{gpu}, {dtype}" for gpu, dtype in columns)),
            [[str(x) for x in (*row, *(shared[*row, *column] for column in columns))] for row in rows],
        ),
    ]


def main() -> None:
    """Compile, write, print. A kernel that does not compile ends it with the compiler's words."""
    given: argparse.Namespace = common.options(__doc__, name="check-kernels-compiled").parse_args()
    results, target = common.begin(given)
    common.collect(results, cells(), lambda cells: [], target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
