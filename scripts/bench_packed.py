"""What packed texts of very different length cost: one of --longest tokens beside --texts of --short in one row.

    python scripts/bench_packed.py          # three minutes on one core

One layer of a mixer with its window, forward and backward in fp32: a row for each text padded to the longest, as it
was; rows of like length together, as it is; and one text of as many tokens. Times are medians over interleaved rounds.

Writes eval/results/NAME.json after every cell, and a table (.md) beside it at the end.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import bench_common as common
import torch
from bench_common import Cell, Claim

from linearize.conversion.costs import context, make
from linearize.model.mixers import Geometry
from linearize.model.ops.rows import Packed, Rows

LONGEST, ALIKE, PLAIN = "padded to the longest", "rows of like length", "one text"


def calls(name: str, given: argparse.Namespace) -> dict[str, tuple[Callable[[], Any], int]]:
    """Way -> a pass over the tokens, and how many it computes, with padding."""
    heads, groups = given.heads
    mixer = make(name, {"window": 64, "sinks": 4}, Geometry(heads, groups, 64, 64))
    lengths = [given.short] * (given.texts // 2) + [given.longest] + [given.short] * (given.texts - given.texts // 2)
    qkv = [torch.randn(1, n, sum(lengths), 64, requires_grad=True) for n in (heads, groups, groups)]
    rows = Rows.from_positions(torch.cat([torch.arange(n) for n in lengths])[None])
    if rows is None:
        raise SystemExit("bench_packed: give at least two texts")
    together = [rows._rows(torch.arange(rows.documents))]

    def run(rows: Packed | None) -> None:
        where = context(qkv[0])
        where.rows = rows
        torch.autograd.grad(mixer(*qkv, where).sum(), qkv)

    def as_it_was() -> None:
        with mock.patch.object(Packed, "parts", lambda self, cached: together):
            run(rows)

    return {
        LONGEST: (as_it_was, together[0].valid.numel()),
        ALIKE: (lambda: run(rows), sum(part.valid.numel() for part in rows.parts(False))),
        PLAIN: (lambda: run(None), sum(lengths)),
    }


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    for name in given.mixers:
        ways = calls(name, given)
        seconds = common.interleaved({way: call for way, (call, _) in ways.items()}, given.repeats)
        for way, (_, tokens) in ways.items():
            yield {"mixer": name, "row": way, "tokens": tokens, "seconds": statistics.median(seconds[way])}


def claims(made: list[Cell]) -> list[Claim]:
    ratios = (("≤ 1.3", PLAIN), ("≤ 0.2", LONGEST))
    return [
        claim
        for name in dict.fromkeys(cell["mixer"] for cell in made)
        for limit, other in ratios
        for claim in common.ratio(
            made, f"{name}: {ALIKE} / {other}", limit, "seconds", {"row": ALIKE}, {"row": other}, mixer=name
        )
    ]


def main() -> None:
    parser = common.options(__doc__, name="bench-packed")
    parser.add_argument("--mixers", nargs="+", default=["gla", "kda"])
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest text (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=140, help="beside it (default: %(default)s)")
    parser.add_argument("--short", type=int, default=100, help="tokens of each of those (default: %(default)s)")
    parser.add_argument("--heads", type=int, nargs=2, default=[3, 1], help="of queries, and of keys (default: 3 1)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    given = parser.parse_args()
    results, target = common.begin(given)
    common.collect(results, cells(given), claims, target)
    rows = [(c["mixer"], c["row"], f"{c['tokens']:,}", f"{c['seconds']:.2f}") for c in results["cells"]]
    lines = [f"# {given.texts} texts of {given.short} tokens beside one of {given.longest}"]
    lines += common.table(("mixer", "way", "tokens, padding included", "seconds"), rows, left=2)
    common.write_markdown(lines + common.claims_table(results["claims"], "times"), target)


if __name__ == "__main__":
    main()
