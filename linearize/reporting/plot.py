"""Pictures of what `inspect`, `allocate`, `select` and `bench` say, and a report's charts as SVG. Only here is
matplotlib."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from linearize.checkpoint.replacing import check_file_output
from linearize.errors import InputError
from linearize.formats import format_bytes, plain

Points = list[tuple[int, float, int]]
"""Of one model: context, seconds per token and bytes of the cache."""
COLOURS = {"source": "#444444", "window": "#d98c21", "student": "#1f6fb4"}
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.color": "#e2e2e2",
    "font.sans-serif": ["DejaVu Sans"],  # for the layout; the page has fonts of its own
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "text.parse_math": False,  # a name may hold a dollar
}
MARKS = {
    **dict.fromkeys(("eps", "ps"), (b"%!PS",)),
    **dict.fromkeys(("jpg", "jpeg"), (b"\xff\xd8\xff",)),
    **dict.fromkeys(("tif", "tiff"), (b"II*\0", b"MM\0*")),
    **{"gif": (b"GIF8",), "png": (b"\x89PNG",), "pdf": (b"%PDF",), "pgf": (b"Matplotlib",), "svgz": (b"\x1f\x8b",)},
    **{"svg": (b"<?xml", b"<svg"), "webp": (b"WEBP",), "avif": (b"ftypavif",)},
}
"""What stands at the beginning of a picture, by its suffix."""
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def draw(model: dict[str, Any], target: Path) -> Path:
    """Write a picture of a model: its layers by mixer, and the cache of one row by context length.

    Args:
        model: what `linearize.checkpoint.describe.inspect` returned.
        target: file to write; its suffix names the format (png, svg, pdf).

    Returns:
        `target`.

    Raises:
        InputError: the suffix names no format, or the file cannot be written.
    """
    figure = _figure(target, 11, 4.5)
    origin = model["source"]
    title = plain(Path(model["path"]).name + (f", from {origin['id']}" if origin else ""))
    figure.suptitle(title, parse_math=False)
    layers, cache = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_layers(layers, model["layers"])
    _draw_cache(cache, model["cache"]["contexts"])
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


def draw_selection(selection: dict[str, Any], target: Path) -> Path:
    """Write a picture of what each budget of softmax layers or heads costs: KL to the source against cache at 32K.

    Args:
        selection: what `linearize.recovery.select` returned.
        target: as for `draw`.

    Returns:
        `target`.

    Raises:
        InputError: as `draw`.
    """
    figure = _figure(target, 7, 4.5)
    axes = figure.subplots()
    rows, keep, per = (selection[key] for key in ("budgets", "keep", "per"))
    sizes = [row["cache_32k"] / 2**20 for row in rows]
    axes.plot(sizes, [row["predicted_kl"] for row in rows], ".-", color=COLOURS["student"], label="predicted (a sum)")
    measured = [(size, row["kl"]) for size, row in zip(sizes, rows, strict=True) if row["kl"] is not None]
    axes.plot(*zip(*measured, strict=True), "o", color=COLOURS["source"], label="measured")
    axes.axvline(sizes[keep], color=COLOURS["window"], label=f"{keep} {per} stay softmax")
    axes.set(xlabel="cache of one row at 32K tokens (MiB)", ylabel="KL to the source, nats per token")
    axes.set_title(f"softmax {per} by {selection['by']}")
    axes.legend()
    return _save(figure, target)


def draw_allocation(allocation: dict[str, Any], target: Path) -> Path:
    """Write a picture of what each budget of cache costs, equally divided and allocated: predicted KL against bytes.

    Args:
        allocation: what `linearize.recovery.allocate` returned.
        target: as for `draw`.

    Returns:
        `target`.

    Raises:
        InputError: as `draw`.
    """
    figure = _figure(target, 7, 4.5)
    axes = figure.subplots()
    shares = [row["share"] for row in allocation["budgets"]]
    for name, colour in (("equal", "window"), ("allocated", "student")):
        costs = [row[name] for row in allocation["budgets"]]
        axes.plot(shares, costs, ".-", color=COLOURS[colour], label=f"{name}, predicted (a sum over layers)")
        axes.plot(allocation["equal"], allocation["kl"][name], "o", color=COLOURS[colour], label=f"{name}, measured")
    axes.set(xlabel=f"{allocation['key']} of a layer, on average", ylabel="KL to the source, nats per token")
    axes.set_yscale("log")
    axes.legend()
    return _save(figure, target)


def check_target(target: Path) -> None:
    """Refuse a picture that cannot be made, before long work on what it shows.

    Raises:
        InputError: the suffix names no format, or a file of another kind is in its place.
    """
    _figure(target, 1, 1)


def _figure(target: Path, width: float, height: float) -> Any:
    """An empty figure that can be saved as `target`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in formats:
        raise InputError(f"--plot {target}: unknown kind of picture; expected a name ending in {', '.join(formats)}")
    marks = MARKS.get(target.suffix.lstrip(".").lower(), ())
    check_file_output(target, "a picture of this format", lambda content: any(mark in content[:64] for mark in marks))
    return figure


def _save(figure: Any, target: Path) -> Path:
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise InputError(f"--plot {target}: cannot be written ({error.strerror}); choose another file") from error
    return target


def svg(plot: Callable[[Any], None], label: str, height: float = 3.0) -> str:
    """A chart as an `<svg>` element that stands in HTML and scales to the width it is given, from 360 px on.

    Args:
        plot: draws on the axes that it is called with.
        label: what the chart shows, for those who cannot see it; different for every chart of a page.
        height: in inches, of 5 inches of width.
    """
    # The same file from the same numbers; charts of one page share no names.
    with rc_context({**STYLE, "svg.hashsalt": label}), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks: the browser, which draws the text, has others.
        warnings.filterwarnings("ignore", message="Glyph|constrained_layout")  # or a name too long for the picture
        figure = Figure(figsize=(5, height), layout="constrained")
        plot(figure.subplots())
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(written.getvalue())  # without the comments, which repeat every text
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    for element in root.iter():
        # HTML has no namespaces, and matplotlib numbers its groups anew in every chart.
        element.tag = element.tag.removeprefix(SVG)
        group = element.tag == "g"
        element.attrib = {k.removeprefix(XLINK): v for k, v in element.items() if not (group and k == "id")}
    return ElementTree.tostring(root, encoding="unicode")


def _draw_layers(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Parameters of every layer, coloured by its mixer; new ones on top."""
    kinds = [row["mixer"] + (f", W {row['window']}" if "window" in row else "") for row in rows]
    for kind in sorted({*kinds}):
        own = [row for row, its_kind in zip(rows, kinds, strict=True) if its_kind == kind]
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
