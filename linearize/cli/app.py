"""The application that all verbs belong to, the options that several of them take, and how they print."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from linearize.formats import plain


class HandedOn(Exception):
    """Carries, as its cause, an exception that typer would turn into exit code 1, which is an answer of ours."""


class _Group(TyperGroup):
    def make_context(self, *args: Any, **options: Any) -> Any:
        with _handing_on():  # help is printed here
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _handing_on():
            return super().invoke(ctx)


@contextlib.contextmanager
def _handing_on() -> Iterator[None]:
    try:
        yield
    except (BrokenPipeError, EOFError) as error:
        raise HandedOn from error


app = typer.Typer(
    cls=_Group,
    help="Turn a pretrained language model into a linear-recurrent one, recover it, and measure what was lost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text: the same on every terminal, and rich need not be imported
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

DEBUG = "LINEARIZE_DEBUG"


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show the traceback of an error; also by {DEBUG}=1.")] = False,
) -> None:
    """Options of all verbs; launched processes get them through the environment."""
    if debug:
        os.environ[DEBUG] = "1"


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that linearize wrote.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; may be repeated.")
]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Recipe = Annotated[str | None, typer.Option(help="Recipe name or file.  [default: DIR/recipe.yaml]")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")]
WithCode = Annotated[
    bool, typer.Option("--with-code", help="Bring the code along, for trust_remote_code without this package.")
]
Flags = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- ACCELERATE_FLAGS", help="Flags of `accelerate launch`.", show_default=False),
]


def show(value: Any, as_json: bool, text: Any = "") -> None:
    """Print a result to stdout: as JSON, or as its text or rich table (120 wide where stdout is no terminal)."""
    if not is_main():
        return
    if as_json or isinstance(text, str):
        print(json.dumps(value, indent=2, default=str) if as_json else plain(text, lines=True))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(text)


def is_main() -> bool:
    """Whether this process talks to the user: one of those that a launcher starts does."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Print a line for people to stderr."""
    print(plain(text, lines=True), file=sys.stderr, flush=True)


def next_step(as_json: bool, *steps: str) -> None:
    """Say on stderr, as the last line, what one would do now; nothing where a program reads.

    Args:
        as_json: whether the result was printed as JSON.
        *steps: what one may do, each a command and what it is for; joined by "or".
    """
    if not as_json and is_main():
        note(f"Next: {', or '.join(steps)}")


def command(verb: str, *words: object) -> str:
    """A command of this package as one would type it."""
    return shlex.join(["linearize", verb, *map(str, words)])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    """A rich table of plain text; a rule below its header and none between its rows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(plain(cell)) for cell in row))
    return grid
