"""A results file with every section: one of a run of SmolLM2-135M, and made-up sections where it has none."""

import json
import math
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parent / "results_example.json"
POWER = {"source": 0.0, "student": 0.6, "student/window": 3.0}  # how fast made-up recall falls with the length


def full() -> dict[str, Any]:
    """Valid results; the made-up numbers are smooth functions of length, depth and column, all of them different."""
    results = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    results["layers"] = [
        {"layer": i, "mixer": "softmax"}
        if i in (20, 23)
        else {"layer": i, "mixer": "gla", "window": 64, "sinks": 4, "combine": "memory"}
        for i in range(30)
    ]
    mmlu = {**results["columns"]["student"]["tasks"]["embedded_piqa"], "label": "MMLU", "chance": 0.25, "items": None}
    for i, (name, column) in enumerate(results["columns"].items()):
        column["tasks"]["mmlu"] = {**mmlu, "value": 0.31 - 0.01 * i, "stderr": 0.004}
        if name in POWER:
            column["recall"] = _recall(POWER[name])
            column["capacity"] = _capacity(POWER[name])
        column["behaviour"] = _behaviour(i, name.startswith("student"))
        if "/" not in name and name != "converted":
            column["speed"] = _speed(grows=name == "source", offset=i)
    return results


def _recall(power: float) -> list[dict[str, Any]]:
    entries = []
    for task, depths in (("needle", [0.0, 0.25, 0.5, 0.75, 1.0]), ("associative", [None])):
        for multiple in (1, 4, 16, 64):
            for depth in depths:
                value = multiple ** (-power * (1 - (depth or 0)) / 2) * 0.97
                entries.append(
                    {
                        "task": task,
                        "length": 64 * multiple,
                        "multiple": multiple,
                        "depth": depth,
                        "value": value,
                        "stderr": 0.1,
                        "n": 10,
                        "items": [value] * 10,
                    }
                )
    return entries


def _capacity(power: float) -> list[dict[str, Any]]:
    return [
        {
            "pairs": pairs,
            "length": 9 * pairs,
            "cache_bytes": 2**20 * (pairs if power == 0 else 6),
            "value": 0.93 * (8 / pairs) ** (power / 3),
            "stderr": 0.1,
            "n": 10,
            "items": [0.5] * 10,
        }
        for pairs in (8, 32, 128)
    ]


def _behaviour(i: int, has_state: bool) -> dict[str, Any]:
    edges = [1, 64, 128, 256, 512]
    return {
        "kl": {
            "value": 0.1234 * i,
            "stderr": 0.0021,
            "tokens": 2044,
            "by_position": [
                {"start": start, "end": end, "kl": 0.05 * i * math.log2(end), "tokens": 4 * (end - start)}
                for start, end in zip(edges, edges[1:], strict=False)
            ],
        },
        "agreement": {"mean": 20.5 - i, "median": 12.5 - i, "lengths": [max(0, 3 * n - 2 * i) for n in range(20)]},
        "repetition": {
            "rep_2": 0.31 + i / 100,
            "rep_3": 0.21,
            "rep_4": 0.17,
            "distinct_1": 0.45,
            "distinct_2": 0.74 - i / 100,
        },
        "cached": {"checked": 400, "equal": 400 - i, "difference": 1.5e-5},
        "state": [
            {"position": n, "norm": 2 + math.log2(n) * (1 + i / 10), "effective_rank": min(40.0, n / (8 + i))}
            for n in (64, 256, 1024, 4096)
        ]
        if has_state
        else None,
    }


def _speed(grows: bool, offset: int) -> list[dict[str, Any]]:
    rows = []
    for batch in (1, 8):
        for context in (256, 2048, 8192, 32768):
            token = 0.061 + 0.001 * offset + (context * batch * 1e-5 if grows else 0)
            cache = 46080 * batch * (context if grows else 100 + offset)
            rows.append(
                {
                    "context": context,
                    "batch": batch,
                    "prefill_seconds": context * batch / 900,
                    "token_seconds": token,
                    "low": 0.97 * token,
                    "high": 1.06 * token,
                    "peak_bytes": 700_000_000 + cache,
                    "cache_bytes": cache,
                }
            )
    return rows
