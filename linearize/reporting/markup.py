"""The few elements of HTML that the report is made of. Arguments are HTML already, unless they are called names."""

from collections.abc import Iterable
from html import escape

from linearize.reporting.charts import Styles

_MARKS = {True: ("yes", "✓"), False: ("no", "✗"), None: ("open", "?")}
_WORDS = {True: "yes", False: "no", None: "cannot be told"}
_DASHES = {
    "-": "",
    "--": ' stroke-dasharray="6 3"',
    ":": ' stroke-dasharray="2 3"',
    "-.": ' stroke-dasharray="7 3 2 3"',
}


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section><h2>{title}</h2>", *(part for part in parts if part), "</section>"])


def table(header: list[str], rows: list[list[str]], words: bool = False, bold: list[int] | None = None) -> str:
    """A table that scrolls sideways where the page is narrower; the first column stays.

    Args:
        header, rows: cells, of equal number.
        words: cells are text, not numbers.
        bold: numbers of the columns that stand out.
    """

    def line(cells: list[str], tag: str) -> str:
        marked = [f'<{tag} class="bold">' if i in (bold or ()) else f"<{tag}>" for i in range(len(cells))]
        return "<tr>" + "".join(f"{start}{cell}</{tag}>" for start, cell in zip(marked, cells, strict=True)) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    shape = "words" if words else "num"
    head = f"<thead>{line(header, 'th')}</thead>"
    return f'<div class="scroll"><table class="{shape}">{head}\n<tbody>\n{body}\n</tbody></table></div>'


def figure(svg: str, caption: str, key: str = "") -> str:
    return f"<figure><figcaption>{caption}</figcaption>{key}{svg}</figure>"


def figures(parts: list[str]) -> str:
    """Figures beside each other where there is room."""
    return f'<div class="grid">{"".join(parts)}</div>' if parts else ""


def legend(names: Iterable[str], colours: Styles, bars: bool = False) -> str:
    """Names of columns with their colours and dashes, or as blocks of colour (`bars`)."""
    return colour_key([(name, *colours[name]) for name in names], bars)


def colour_key(entries: list[tuple[str, str, str]], bars: bool = True) -> str:
    """A legend of (name, colour, dashes)."""
    items = []
    for name, colour, dashes in entries:
        shape = (
            f'<rect width="28" height="10" fill="{colour}"/>'
            if bars
            else f'<path d="M0 5H28" stroke="{colour}" stroke-width="3"{_DASHES[dashes]}/>'
        )
        items.append(f'<li><svg viewBox="0 0 28 10" aria-hidden="true">{shape}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def kind(holds: bool | None) -> str:
    """The class of what holds, does not, or cannot be told: yes, no, open."""
    return _MARKS[holds][0]


def checklist(checks: list[tuple[str, str, bool | None]]) -> str:
    """A list of (asked, found, whether it holds)."""
    items = [
        f'<li class="{kind(holds)}"><span class="mark">{_MARKS[holds][1]}</span><span>{asked}: <b>{_WORDS[holds]}</b>. '
        f'<span class="dim">{found}</span></span></li>'
        for asked, found, holds in checks
    ]
    return f'<ul class="checks">{"".join(items)}</ul>'


def more(summary: str, content: str) -> str:
    """Content that opens when its summary is chosen."""
    return f"<details><summary>{summary}</summary>{content}</details>"
