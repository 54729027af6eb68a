"""Pictures of what `inspect` and `bench` found.

All of matplotlib is here; it is an extra, `pip install linearize[plot]`.
"""

from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.files import format_bytes

Points = list[tuple[int, float, int]]
"""Of one model: context, seconds per token and bytes of the cache."""
COLOURS = {"source": "#444444", "window": "#d98c21", "student": "#1f6fb4"}


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
    figure = _figure(target, 11, 4.5)
    origin = found["source"]
    figure.suptitle(Path(found["path"]).name + (f", from {origin['id']}" if origin else ""))
    layers, cache = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_layers(layers, found["layers"])
    _draw_cache(cache, found["cache"]["contexts"])
    return _save(figure, target)


def draw_speed(panels: dict[str, dict[str, Points]], target: Path) -> Path:
    """Write a picture of decoding: time per token and bytes of the cache against the context, on log axes.

    Args:
        panels: title -> name of a model -> its points; side by side.
        target: as for `draw`.

    Returns:
        `target`.

    Raises:
        InputError: as `draw`, or there is no point to draw.
    """
    if not any(points for panel in panels.values() for points in panel.values()):
        raise InputError(f"--plot {target}: nothing was measured, so there is nothing to draw")
    figure = _figure(target, max(5.5, 4 * len(panels)), 6)
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row")
    for (times, sizes), (title, panel) in zip(axes.T, panels.items(), strict=True):
        times.set_title(title)
        sizes.set_xlabel("context (tokens)")
        for name, points in panel.items():
            x, seconds, held = zip(*sorted(points), strict=True) if points else ((), (), ())
            colour = COLOURS.get(name)
            times.loglog(x, [1e3 * value for value in seconds], "o-", color=colour, label=name)
            sizes.loglog(x, [value / 2**20 for value in held], "o-", color=colour, label=name)
        ticks = sorted({point[0] for points in panel.values() for point in points})
        sizes.set_xticks(ticks, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in ticks])
        sizes.xaxis.minorticks_off()
    axes[0][0].set_ylabel("milliseconds per token")
    axes[1][0].set_ylabel("cache (MiB)")
    axes[0][0].legend(frameon=False)
    return _save(figure, target)


def check_target(target: Path) -> None:
    """Refuse a picture that cannot be made, before long work on what it shows.

    Raises:
        InputError: matplotlib is not installed, or the suffix names no format.
    """
    _figure(target, 1, 1)


def _figure(target: Path, width: float, height: float) -> Any:
    """An empty figure that can be saved as `target`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"--plot {target}: needs matplotlib, which is not installed; run `pip install linearize[plot]`"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in formats:
        raise InputError(f"--plot {target}: unknown kind of picture; expected a name ending in {', '.join(formats)}")
    return figure


def _save(figure: Any, target: Path) -> Path:
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
