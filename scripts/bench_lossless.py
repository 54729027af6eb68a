"""Lossless mode against the source and the student alone: eval/results/bench-lossless.json and .md.

    python scripts/bench_lossless.py --folder runs/smollm2-135m-best/0-converted

The gain on larger models is computed, not measured: from the bytes that a step moves, and the acceptance seen here.
"""

from typing import Any

import bench_common as common
import torch

from linearize.formats import format_bytes
from linearize.generation.lossless import Pace
from linearize.generation.speed import bench_lossless, line

MODELS = {"SmolLM2-135M": (135e6, 30, 3, 64), "Llama-3.2-1B": (1.24e9, 16, 8, 64), "Llama-3-8B": (8.03e9, 32, 8, 128)}
"""Parameters, layers, key/value heads, width of a head."""
LENGTHS = (8192, 32768, 131072)


def computed(accepted: float) -> list[tuple[str, ...]]:
    """Rows: model, context, bytes of cache, drafts per pass and gain where bytes in bf16 are all that counts."""
    rows = []
    for name, (parameters, layers, heads, width) in MODELS.items():
        weights = 2 * parameters
        for context in LENGTHS:
            cache = 2 * 2 * layers * heads * width * context
            pace = Pace(accepted=accepted, step=weights + cache, draft=weights)
            best = pace.best()
            rows.append((name, f"{context:,}", format_bytes(cache), str(best), f"{pace.gain(best):.2f}"))
    return rows


def cells(dtype: str, row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table."""
    tie = row["tie"]
    rates = (f"{row[name]['tokens_per_second']:.1f}" for name in ("source", "lossless", "student"))
    return (
        *(dtype, f"{row['context']:,}", *rates, f"{row['ratio']['lossless']:.2f}", f"{row['ratio']['resumed']:.2f}"),
        f"{row['per_pass']['resumed']:.2f}",
        *(f"{row['ratio']['forced']:.2f}", f"{row['per_pass']['forced']:.2f}", f"{row['kept']['forced']:.2f}"),
        f"{row['reading_seconds']['student']:.1f}",
        "yes"
        if tie is None
        else f"to a tie of {tie['gap']:.2g}, as far as reading by steps moves logits ({tie['moves']:.2g})",
    )


def main() -> None:
    """Measure, compute, write, print."""
    parser = common.options(__doc__, name="bench-lossless")
    parser.add_argument("--folder", required=True, help="an untrained linearized folder, or adapters")
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    given = parser.parse_args()
    results, target = common.begin(given)
    measured: dict[str, Any] = {}
    results["dtypes"] = measured
    for dtype in given.dtypes:
        measured[dtype] = bench_lossless(
            given.folder, common.validation_text(), given.contexts, given.tokens, dtype, say=print
        )
        common.save(results, target)
    table = [cells(dtype, row) for dtype, each in measured.items() for row in each["rows"]]
    head = ("dtype", "context", "source", "lossless", "student", "lossless / source")
    head += ("… student's state at hand", "tokens per pass", "always 4 drafts", "tokens per pass")
    head += ("kept", "student reads, s", "same text")
    rows = [row for each in measured.values() for row in each["rows"]]
    accepted = sum(row["pace"]["accepted"] for row in rows) / len(rows)
    lines = [
        f"{given.tokens} greedy tokens behind WikiText-2 validation, batch 1, {torch.get_num_threads()} threads;",
        "tokens per second of writing, median of five turns. Drafting needs the student's state of the text: lossless",
        "reads it where the tokens to come can repay that, within its seconds. Beside it, with the state at hand:",
        "where it decides for itself, and where it drafts four tokens in every round, whether that pays or not.",
        *common.table(head, table),
        "",
        "Computed, not measured: where the bytes of weights (bf16) and cache are all that a step costs, with the "
        f"acceptance of {accepted:.2f}.",
        *common.table(("model", "context", "cache of the source", "drafts", "gain"), computed(accepted)),
    ]
    common.save(results, target)
    common.write_markdown(lines, target)
    for each in measured.values():
        print("\n".join(map(line, each["rows"])))


if __name__ == "__main__":
    main()
