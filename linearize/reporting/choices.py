"""What `select` and `allocate` returned, for a terminal; plot.py draws it."""

from typing import Any

from linearize.formats import aligned, format_bytes, ranges


def selection(choice: dict[str, Any]) -> str:
    """Lines of what `linearize.recovery.select` returned: the choice, each layer alone, and what every budget costs."""
    ranked = any(row["score"] not in (None, row["kl"]) for row in choice["alone"])
    per = choice["per"]
    keys = ("layer", "head") if per == "heads" else ("layer",)
    alone: list[tuple[str, ...]] = [(*keys, "KL alone", *["score"] * ranked, "stays")]
    for row in sorted(choice["alone"], key=lambda row: -(row["score"] if ranked else row["kl"])):
        where = choice[per] if per == "layers" else choice[per].get(str(row["layer"]), ())
        numbers = [f"{row[key]:.4g}" for key in ("kl", *["score"] * ranked)]
        alone.append((*(str(row[key]) for key in keys), *numbers, "softmax" if row[keys[-1]] in where else ""))
    budgets = [("keep", "predicted KL", "measured KL", "cache at 32K", per)]
    for row in choice["budgets"]:
        kl = "" if row["kl"] is None else f"{row['kl']:.4g}"
        size = format_bytes(row["cache_32k"])
        budgets.append((str(row["keep"]), f"{row['predicted_kl']:.4g}", kl, size, _parts(row)))
    return "\n".join(
        [
            f"{choice['keep']} of {len(choice['alone'])} replaced {per} by {choice['by']}: "
            f"softmax in {_parts(choice) or 'none'}",
            f"KL to the source in nats per token, {choice['tokens']} tokens in blocks of {choice['seq_len']}; "
            f"predicted: sum over the {per} that stay replaced, each measured alone, an estimate",
            "",
            *aligned(alone),
            "",
            *aligned(budgets),
        ]
    )


def _parts(choice: dict[str, Any]) -> str:
    """Layers as ranges, heads as ``3:0,2 5:1``."""
    if "layers" in choice:
        return ranges(choice["layers"])
    return " ".join(f"{i}:{','.join(map(str, heads))}" for i, heads in choice["heads"].items())


def allocation(choice: dict[str, Any]) -> str:
    """Lines of what `linearize.recovery.allocate` returned."""
    sizes, kl = choice["sizes"], choice["kl"]
    by_size: dict[int, list[int]] = {}
    for layer, size in sizes.items():
        by_size.setdefault(size, []).append(int(layer))
    rows: list[tuple[str, ...]] = [(choice["key"], "layers")]
    rows += [(str(size), ranges(sorted(layers))) for size, layers in sorted(by_size.items())]
    budgets = [("share of a layer", "predicted KL, equal", "allocated")]
    budgets += [(str(row["share"]), f"{row['equal']:.4g}", f"{row['allocated']:.4g}") for row in choice["budgets"]]
    return "\n".join(
        [
            f"{format_bytes(choice['cache'][choice['better']])} of cache for {len(sizes)} layers: KL to the "
            f"source {kl['allocated']:.4g} allocated, {kl['equal']:.4g} in equal shares of {choice['equal']} (nats per "
            f"token, text that nothing was chosen on); {choice['better']} is kept",
            "",
            *aligned(rows),
            "",
            *aligned(budgets),
        ]
    )
