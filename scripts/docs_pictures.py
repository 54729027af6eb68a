"""Pictures of the documentation that are drawn from committed results, as SVG that needs no font and no script."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from docs_tables import BEYOND, CLUSTERS, GLA, WINDOWS, beyond, cached, column, read, recall

INK, DIM, RULE = "#1c1c1c", "#5a5a5a", "#d8d8d8"
FONT = "font-family='system-ui, -apple-system, Segoe UI, Roboto, sans-serif'"
MIB = 2**20
Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """A chart with a logarithmic x axis.

    Attributes:
        title: above it.
        x, y: words for the axes.
        ticks_x, ticks_y: value and label of each line of the grid; the first and last are the ends of the axes.
        marks: label, x, y, colour, and where the label stands: anchor, dx, dy.
        lines: colour and points of lines.
        log_y: whether y is logarithmic too.
    """

    title: str
    x: str
    y: str
    ticks_x: Sequence[tuple[float, str]]
    ticks_y: Sequence[tuple[float, str]]
    marks: Sequence[tuple[str, float, float, str, str, float, float]] = ()
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]] = ()
    log_y: bool = False

    def draw(self, left: float, top: float, width: float, height: float) -> str:
        """The panel as elements of an SVG whose plot area has this corner and size."""

        def along(value: float, ticks: Sequence[tuple[float, str]], log: bool) -> float:
            low, high, value = ((math.log(each) if log else each) for each in (ticks[0][0], ticks[-1][0], value))
            return (value - low) / (high - low)

        def at(x: float, y: float) -> tuple[float, float]:
            return (
                left + width * along(x, self.ticks_x, True),
                top + height * (1 - along(y, self.ticks_y, self.log_y)),
            )

        parts = [_text(left, top - 24, self.title, size=15, weight=600), _text(left, top - 7, self.y, fill=DIM)]
        parts.append(_text(left + width, top + height + 36, self.x, "end", fill=DIM))
        for value, label in self.ticks_y:
            y = at(self.ticks_x[0][0], value)[1]
            parts.append(f"<path d='M{left:.1f} {y:.1f}h{width:.1f}' stroke='{RULE}'/>")
            parts.append(_text(left - 7, y + 4, label, "end", fill=DIM))
        for value, label in self.ticks_x:
            x = at(value, self.ticks_y[0][0])[0]
            parts.append(_text(x, top + height + 17, label, "middle", fill=DIM))
        for colour, points in self.lines:
            path = "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in points)
            parts.append(f"<path d='M{path}' fill='none' stroke='{colour}' stroke-width='2.5'/>")
        for label, px, py, colour, anchor, dx, dy in self.marks:
            x, y = at(px, py)
            parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5.5' fill='{colour}'/>")
            parts.append(_text(x + dx, y + dy, label, anchor, weight=600, fill=colour))
        return "\n".join(parts)


def _text(
    x: float, y: float, words: str, anchor: str = "start", size: int = 12, weight: int = 400, fill: str = INK
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}' font-weight='{weight}' "
        f"fill='{fill}' {FONT}>{escape(words)}</text>"
    )


def picture(panels: Sequence[Panel], about: str) -> str:
    """Panels side by side, with words for those who cannot see them."""
    width, height = 410, 240
    drawn = "\n".join(panel.draw(45 + width * index, 50, 345, height) for index, panel in enumerate(panels))
    size = f"{width * len(panels)} {height + 100}"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {size}' role='img' aria-label='{escape(about)}'>\n"
        f"<title>{escape(about)}</title>\n<rect width='100%' height='100%' rx='8' fill='#fff'/>\n{drawn}\n</svg>\n"
    )


COLOURS = {"source": "#222222", "window": "#b34700", "gla": "#7b3fa0", "clusters": "#00609c"}


def tradeoff() -> str:
    """Perplexity and recall against bytes of the cache, for the source, the window control, gla and clusters."""
    entries = {
        "source": column(CLUSTERS, "source"), "window": column(CLUSTERS, "window"),
        "gla": column(GLA, "student"), "clusters": column(CLUSTERS, "student"),
    }  # fmt: skip
    sizes = {name: (cached(entry) or 0) / MIB for name, entry in entries.items()}
    lost = {name: beyond(entry) or 0.0 for name, entry in entries.items()}
    right = {name: 100 * (recall(entry) or 0.0) for name, entry in entries.items()}
    bytes_ = [(2, "2 MiB"), (4, "4"), (8, "8"), (16, "16"), (32, "32"), (64, "64"), (128, "128")]
    beside = {
        "source": ("end", -9, -9),
        "window": ("start", 10, 4),
        "gla": ("start", 10, 4),
        "clusters": ("start", 10, 4),
    }
    label = "cache at 2048 tokens (the source's grows with the text)"
    panels = [
        Panel(
            f"Perplexity behind {BEYOND} tokens", label, "lower is better", bytes_,
            [(15, "15"), (20, "20"), (25, "25"), (30, "30"), (35, "35"), (40, "40")],
            [(f"{name} {lost[name]:.1f}", sizes[name], lost[name], COLOURS[name], *beside[name]) for name in entries],
        ),
        Panel(
            f"Recall, {WINDOWS} windows back", label, "per cent right, higher is better", bytes_,
            [(0, "0"), (25, "25"), (50, "50"), (75, "75"), (100, "100")],
            [(f"{name} {right[name]:.0f} %", sizes[name], right[name], COLOURS[name], *place)
             for name, place in (beside | {"window": ("start", 10, -6), "gla": ("start", 10, 12)}).items()],
        ),
    ]  # fmt: skip
    words = "; ".join(
        f"{name}: {sizes[name]:.1f} MiB, perplexity {lost[name]:.1f}, recall {right[name]:.0f} %" for name in entries
    )
    return picture(panels, f"SmolLM2-135M. {words}")


def decoding() -> str:
    """Time per token and size of the cache by context, source against converted."""
    cells = [
        cell for cell in read("bench-decode-x86_64-2-cores.json")["cells"]
        if cell["part"] == "decode" and cell["dtype"] == "float32" and cell["batch"] == 1
    ]  # fmt: skip
    names = {"source": ("source", COLOURS["source"]), "student": ("converted", COLOURS["clusters"])}
    contexts = [(256, "256"), (1024, "1K"), (8192, "8K"), (32768, "32K")]

    def points(kind: str, key: str, scale: float) -> list[tuple[float, float]]:
        return sorted((cell["context"], cell[key] * scale) for cell in cells if cell["kind"] == kind)

    def panel(title: str, y: str, ticks: Sequence[tuple[float, str]], key: str, scale: float, log: bool) -> Panel:
        lines = [(colour, points(kind, key, scale)) for kind, (_, colour) in names.items()]
        marks = [
            (words, *points(kind, key, scale)[-1], colour, "end", -9, -8) for kind, (words, colour) in names.items()
        ]
        return Panel(title, "tokens before", y, contexts, ticks, marks, lines, log)

    times = [(0.0, "0"), (100.0, "100"), (200.0, "200"), (300.0, "300"), (400.0, "400"), (500.0, "500")]
    sizes = [(2.0, "2"), (8.0, "8"), (32.0, "32"), (128.0, "128"), (512.0, "512"), (2048.0, "2048")]
    panels = [
        panel("Time per token", "milliseconds, two CPU cores", times, "seconds", 1e3, False),
        panel("Cache", "MiB, fp32, one row", sizes, "cache_bytes", 1 / MIB, True),
    ]
    about = "; ".join(
        f"{words}: {times_[0][1]:.0f} to {times_[-1][1]:.0f} ms per token from 256 to 32768 tokens"
        for kind, (words, _) in names.items()
        for times_ in [points(kind, "seconds", 1e3)]
    )
    return picture(panels, f"Decoding SmolLM2-135M. {about}")


def budgets() -> str:
    """Perplexity, right answers and time per token of untrained clusters by bytes of the cache."""
    cells = read("bench-memory-curve.json")["cells"]
    texts = list(dict.fromkeys(cell["text"] for cell in cells if cell["part"] == "perplexity"))

    def points(row: str, part: str, value: Callable[[dict[str, Any]], float], text: str | None = None) -> list[Point]:
        """Mebibytes, and the mean of a value over the cells of a row and budget that have it."""
        by_size: dict[float, list[float]] = {}
        for cell in cells:
            if (cell["row"], cell["part"]) == (row, part) and text in (None, cell.get("text")):
                by_size.setdefault(cell.get("bytes", 0) / MIB, []).append(value(cell))
        return sorted((size, sum(each) / len(each)) for size, each in by_size.items())

    def panel(title: str, y: str, ticks: Sequence[tuple[float, str]], part: str, of: Callable[..., float]) -> Panel:
        curve, blue, black = points("clusters, int4", part, of), COLOURS["clusters"], COLOURS["source"]
        level = points("source", part, of)[0][1]
        marks = [
            ("clusters", *curve[-1], blue, "end", -9, 18 if curve[-1][1] > level else -9),
            ("source", curve[0][0], level, black, "start", 9, -9),
        ]
        lines = [(blue, curve), (black, [(curve[0][0], level), (curve[-1][0], level)])]
        return Panel(title, "MiB of cache of clusters", y, sizes, ticks, marks, lines)

    sizes = [(1.75, ""), (2, "2"), (4, "4"), (8, "8"), (16, "16"), (32, "32"), (36, "")]
    lost = {text: points("clusters, int4", "perplexity", lambda cell: cell["over_source"][0], text) for text in texts}
    panels = [
        Panel(
            "Perplexity at 2048 tokens", "MiB of cache of clusters", "of the source's, two texts", sizes,
            [(1.0, "1.0"), (1.1, "1.1"), (1.2, "1.2"), (1.3, "1.3"), (1.4, "1.4")],
            [(text, *next(point for point in line if point[0] > 3), COLOURS["clusters"], *place)
             for (text, line), place in zip(lost.items(), (("start", 10, -4), ("end", -4, 20)), strict=True)],
            [(COLOURS["clusters"], line) for line in lost.values()],
        ),
        panel(
            "Recall, 16 windows back", "per cent right, mean of three tasks",
            [(0, "0"), (25, "25"), (50, "50"), (75, "75"), (100, "100")],
            "recall", lambda cell: 100 * cell["value"],
        ),
    ]  # fmt: skip
    if any(cell["part"] == "speed" for cell in cells):
        times = [(0, "0"), (50, "50"), (100, "100"), (150, "150"), (200, "200"), (250, "250")]
        panels.append(
            panel(
                "Time per token behind 2048",
                "milliseconds, one CPU core",
                times,
                "speed",
                lambda cell: 1e3 * cell["token_seconds"],
            )
        )
    about = "; ".join(f"{size:.0f} MiB: {times:.2f} times the source's perplexity" for size, times in lost[texts[0]])
    return picture(panels, f"SmolLM2-135M with clusters, untrained. {about}")


PICTURES: dict[str, Callable[[], str]] = {"tradeoff.svg": tradeoff, "decoding.svg": decoding, "budgets.svg": budgets}
