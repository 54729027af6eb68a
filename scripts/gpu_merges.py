"""The kernel that merges clusters on a GPU: its time for a block of 2,048 tokens by its constants, beside PyTorch's.

    python scripts/gpu_merges.py               # two minutes on one H100

*same*: the share of clusters that went where PyTorch sent them, over all merges of the block: a product rounded in
another way could join another pair. Constants are those of linearize/model/ops/clusters_backend.py. Random keys.

Writes eval/results/gpu-merges.json after every cell, and a table (.md) beside it at the end.
"""

import argparse
import os
from collections.abc import Iterator
from typing import Any

import bench_common as common
import torch
from bench_common import Cell

from linearize.model.ops import clusters, clusters_backend

TOKENS = 2048
SIZES = ((16, 3, 128, 64), (16, 3, 464, 64), (1, 3, 128, 64), (1, 8, 128, 128), (1, 8, 464, 128))
"""B, G, M, and K = V: SmolLM2-135M in training, and reading one text; Llama-3-8B reading one text."""
VARIANTS = (
    # PROGRAMS, SPLIT, PRECISION, warps, ROWS and COLUMNS.
    (1, False, "ieee", 8, 64), (1, False, "tf32x3", 8, 64), (4, False, "tf32x3", 8, 64), (8, False, "tf32x3", 8, 64),
    (1, True, "tf32x3", 8, 64), (4, True, "tf32x3", 8, 64), (2, False, "ieee", 8, 64), (1, False, "tf32x3", 4, 64),
    (1, False, "tf32x3", 8, 32),
)  # fmt: skip


def inputs(B: int, G: int, M: int, K: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of `clusters._merges`."""
    C = M // 8
    S = TOKENS // C
    sizes = torch.stack([torch.randint(1, 9, (B, G, M)).float(), torch.rand(B, G, M)], -1)
    x = torch.randn(B, G, S + 1, K)
    given = (
        torch.randn(B, G, M, 2 * K), sizes, torch.randn(B, G, S * C, 2 * K),
        torch.tensor([1.0, 0.0]).expand(B, G, S * C, 2), torch.cat([3 * x.square(), x], -1).cumsum(2),
        torch.ones(B, S, dtype=torch.bool),
    )  # fmt: skip
    return *(each.cuda() for each in given), clusters.Rule(C, 0.3, 1.0, 3), dtype


def measured(given: argparse.Namespace) -> Iterator[Cell]:
    """Every size, PyTorch and the variants of the kernel."""
    for B, G, M, K in SIZES:
        for dtype in (torch.float32, *([torch.int8] if M == 464 else [])):
            x = inputs(B, G, M, K, dtype)
            os.environ["LINEARIZE_BACKEND"] = "torch"
            went = torch.stack(clusters._merges(*x)[2])  # type: ignore[arg-type]
            where = {"B": B, "G": G, "M": M, "K": K, "dtype": str(dtype).removeprefix("torch.")}

            def seconds() -> float:
                return min(common.interleaved({"": lambda: clusters._merges(*x)}, 3, "cuda")[""])  # noqa: B023

            yield where | {"kind": "PyTorch", "seconds": seconds()}
            os.environ["LINEARIZE_BACKEND"] = "fla"
            for programs, split, precision, warps, tile in VARIANTS:
                if programs > 1 and not split and B * G * programs > clusters_backend._at_once(x[0].device):
                    continue
                clusters_backend.PROGRAMS, clusters_backend.SPLIT = programs, split
                clusters_backend.PRECISION, clusters_backend.FLAGS = precision, {"num_warps": warps, "num_stages": 1}
                clusters_backend.ROWS = clusters_backend.COLUMNS = tile
                name = f"P {programs}{', split' * split}, {precision}, {warps} warps, tiles of {tile}"
                same = (clusters._merges(*x)[2] == went).float().mean().item()  # type: ignore[operator]
                yield where | {"kind": name, "seconds": seconds(), "same": same}


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines of the table."""
    machine, cells = results["environment"], results["cells"]
    columns = list(dict.fromkeys((c["B"], c["G"], c["M"], c["K"], c["dtype"]) for c in cells))
    rows = []
    for kind in dict.fromkeys(c["kind"] for c in cells):
        seconds = [common.find(cells, "seconds", kind=kind, **dict(zip("BGMK", c, strict=False)), dtype=c[4])
                 for c in columns]  # fmt: skip
        rows.append((kind, *(common.shown(x, ".1f", 1e3) for x in seconds)))
    worst = min(c["same"] for c in cells if "same" in c)
    head = ("ms", *(f"{b}·{g}, M {m}, K {k}, {dtype}" for b, g, m, k, dtype in columns))
    return [
        f"All merges of {TOKENS:,} tokens: {machine['device']}, commit {machine['commit']}. Of all clusters in all "
        f"merges and variants, at least {worst:.6f} went where PyTorch sent them.",
        *common.table(head, rows),
    ]


def main() -> None:
    """Measure, write, print."""
    given = common.options(__doc__, name="gpu-merges").parse_args()
    results, target = common.begin(given, "cuda")
    common.collect(results, measured(given), lambda cells: [], target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
