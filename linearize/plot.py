"""A picture of what `inspect` found. All of matplotlib is here; it is an extra, `pip install linearize[plot]`."""

from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.files import format_bytes


def draw(found: dict[str, Any], target: Path) -> Path:
    """Write a picture of a model: its layers by mixer, and the cache of one row by context length.

    Args:
        found: what `linearize.inspection.inspect` returned.
        target: file to write; its suffix names the format (png, svg, pdf).

    Returns:
        `target`.

    Raises:
        InputError: matplotlib is not installed, the suffix names no format, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"--plot {target}: needs matplotlib, which is not installed; run `pip install linearize[plot]`"
        ) from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    formats = canvas.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in formats:
        raise InputError(f"--plot {target}: unknown kind of picture; expected a name ending in {', '.join(formats)}")
    origin = found["source"]
    figure.suptitle(Path(found["path"]).name + (f", from {origin['id']}" if origin else ""))
    layers, cache = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_layers(layers, found["layers"])
    _draw_cache(cache, found["cache"]["contexts"])
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise InputError(f"--plot {target}: cannot be written ({error.strerror}); choose another place") from error
    return target


def _draw_layers(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Parameters of every layer, coloured by its mixer; new ones on top."""
    kinds = {row["mixer"] + (f", W {row['window']}" if "window" in row else "") for row in rows}
    for kind in sorted(kinds):
        own = [r for r in rows if r["mixer"] + (f", W {r['window']}" if "window" in r else "") == kind]
        old = [(r["parameters"] - r["new_parameters"]) / 1e6 for r in own]
        axes.bar([r["layer"] for r in own], old, label=kind)
        if any(r["new_parameters"] for r in own):
            new = [r["new_parameters"] / 1e6 for r in own]
            axes.bar([r["layer"] for r in own], new, bottom=old, color="black", label="new weights")
    axes.set(xlabel="layer", ylabel="parameters, millions", title="layers")
    axes.legend(loc="lower right")


def _draw_cache(axes: Any, rows: list[dict[str, Any]]) -> None:
    contexts = [row["context"] for row in rows]
    for column, label in (("source_kv", "source"), ("linearized", "this model")):
        sizes = [row[column] for row in rows]
        axes.loglog(contexts, sizes, marker="o", label=f"{label}, {format_bytes(sizes[-1])} at {contexts[-1] // 1024}K")
    axes.set_xticks(contexts, [f"{context // 1024}K" for context in contexts])
    axes.minorticks_off()
    axes.set(xlabel="tokens of context", ylabel="bytes", title="cache of one row")
    axes.legend()
