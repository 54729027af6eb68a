"""Reference pages that come from the code: the command line, what a recipe may say, architectures, messages."""

import ast
import dataclasses
import html
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docs_tables import table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "linearize"


def command_line() -> str:
    """Every verb: what it does, its example, its arguments and options."""
    import typer

    from linearize.cli import app

    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    functions = [info.callback for info in app.registered_commands]
    return "\n\n".join(_verb(*each) for each in zip(commands, commands.values(), functions, strict=True))


def _verb(name: str, command: Any, function: Any) -> str:
    hints = typing.get_type_hints(function)
    about, _, example = inspect.cleandoc(command.help or "").partition("\b")
    example = "\n".join(line.strip() for line in example.replace("Example:", "").strip().splitlines())
    parts = [f"## linearize {name}", about.strip(), *([f"```bash\n{example}\n```"] if example else [])]
    rows = []
    for parameter in command.params:
        if "--help" in parameter.opts:
            continue
        flag, meta = parameter.opts[0], parameter.metavar or _meta(hints[parameter.name])
        option = parameter.param_type_name == "option"
        word = f"{flag} {meta}" if option and not parameter.is_flag else flag if option else meta
        default = parameter.default
        shown = (
            ""
            if not option or parameter.is_flag or default in (None, ()) or callable(default)
            else f" Default: {default}."
        )
        text = re.sub(r"\s*\[default: (.*?)\]", r" Default: \1.", parameter.help or "")
        needed = " Required." if option and parameter.required else ""
        rows.append([f"`{word}`", _prose(text) + needed + shown])
    return "\n\n".join([*parts, table(("argument", "what it does"), rows, left=2)])


def _meta(hint: Any) -> str:
    """What stands for a value in a usage line."""
    words = {int: "NUMBER", float: "NUMBER", Path: "PATH"}
    return next((words[each] for each in (hint, *typing.get_args(hint)) if each in words), "TEXT")


def _prose(text: str) -> str:
    """Text of a help line as Markdown: what is code in it stays code, nothing else is markup."""
    return html.escape(" ".join(text.split()), quote=False).replace("*", "\\*").replace("``", "`")


def recipe() -> str:
    """Every key of a recipe, its type and its default."""
    from linearize.recipe import schema

    sections = {
        "source": schema.Source, "convert": schema.Convert, "data[]": schema.Data, "calibrate": schema.Calibrate,
        "select": schema.Select, "train[]": schema.Stage, "train[].peft": schema.Peft, "eval": schema.Eval,
    }  # fmt: skip
    blocks = [_keys("At the top", schema.Recipe)]
    return "\n\n".join([*blocks, *(_keys(f"`{name}`", cls) for name, cls in sections.items())])


def _keys(title: str, cls: type) -> str:
    about, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")
    told = _attributes(attributes)
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = [
        [f"`{field.name}`", _type(hints[field.name]), f"`{_default(field)}`", _prose(told.get(field.name, ""))]
        for field in dataclasses.fields(cls)
    ]
    if not any(row[3] for row in rows):
        return "\n\n".join(
            [f"## {title}", _prose(about), table(("key", "type", "default"), [r[:3] for r in rows], left=3)]
        )
    return "\n\n".join([f"## {title}", _prose(about), table(("key", "type", "default", "meaning"), rows, left=4)])


def _attributes(text: str) -> dict[str, str]:
    """Names and meanings out of a docstring's Attributes; one line may hold several (`r: rank. alpha: scale.`)."""
    told: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + text.strip("\n")):
        names, colon, meaning = " ".join(entry.split()).partition(": ")
        parts = re.split(r"(?<=\.) (?=[a-z_]+: )", meaning) if colon else []
        for index, part in enumerate(parts):
            name, _, rest = ("", "", part) if index == 0 else part.partition(": ")
            told |= dict.fromkeys((names if index == 0 else name).split(", "), rest)
    return told


def _type(hint: Any) -> str:
    """A type in words: `whole number`, `one of lm, kl`."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if hasattr(hint, "__metadata__"):
        return _type(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return "list" if dataclasses.is_dataclass(arguments[0]) else f"list of {_type(arguments[0])}"
    if arguments and type(None) in arguments:
        return f"{' or '.join(_type(each) for each in arguments if each is not type(None))}, or nothing"
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "see below"}
    if hint in words:
        return words[hint]
    return "a mapping" if origin is dict or dataclasses.is_dataclass(hint) else str(hint)


def _default(field: Any) -> str:
    from pydantic.fields import FieldInfo

    value = field.default
    if isinstance(value, FieldInfo):
        value = value.default_factory() if value.default_factory else "required"  # type: ignore[call-arg]
    if value is dataclasses.MISSING:
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"
    if value == "required":
        return "required"
    if dataclasses.is_dataclass(value) or isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return "see its own table"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False).replace("null", "nothing")


def recipes() -> str:
    """The recipes that ship, and whether they were run."""
    from linearize.recipe import load

    rows = [
        [f"`{each.name}`", each.description, f"`{each.source.id}`", each.status]
        for each in map(load.load, load.names())
    ]
    return table(("recipe", "what it makes", "source", "status"), rows, left=4)


def architectures() -> str:
    """Model types of transformers that pass the check, and why others do not."""
    known = json.loads((PACKAGE / "model" / "architectures.json").read_text(encoding="utf-8"))
    names = [f"`{name}`" for name in known["passes"]] + [""] * (-len(known["passes"]) % 5)
    rows = [names[start : start + 5] for start in range(0, len(names), 5)]
    why: dict[str, list[str]] = {}
    for name, reason in known["fails"].items():
        why.setdefault(_reason(reason), []).append(f"`{name}`")
    failing = [[reason, ", ".join(types)] for reason, types in sorted(why.items(), key=lambda item: -len(item[1]))]
    return "\n\n".join([
        f"With transformers {known['transformers']}, {len(known['passes'])} model types pass:",
        table(("model types that pass", "", "", "", ""), rows, left=5),
        f"{len(known['fails'])} do not. The first reason that the check met:",
        table(("reason", "model types"), failing, left=2),
    ])  # fmt: skip


def _reason(text: str) -> str:
    """Why a model type fails, without what is its own: short ones are names of checks."""
    short = re.sub(r"\s*\(.*|[:;].*", "", text, flags=re.DOTALL)
    if "query heads" in short:
        return "its layers have different numbers of heads"
    known = len(short.split()) > 5 or short.startswith(("no tiny", "is half"))
    return short if known else f"fails the check “{short.partition(',')[0]}”"


def messages() -> str:
    """Every message of an `InputError` in the code, by the part of the package that says it."""
    rooms: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for text in dict.fromkeys(_raised(ast.parse(path.read_text(encoding="utf-8")))):
            rooms.setdefault(room, []).append(text)
    blocks = []
    for room, texts in rooms.items():
        lines = "\n".join(f"- {_prose(text)}" for text in sorted(dict.fromkeys(texts), key=str.lower))
        blocks.append(f"## From `linearize/{room}`\n\n{lines}")
    return "\n\n".join(blocks)


def _raised(tree: ast.AST) -> Iterator[str]:
    """Texts that an InputError is made of; what is filled in later stands as ‹name›."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "InputError":
            for argument in node.args[:1]:
                text = _text(argument)
                if len(re.sub(r"‹.*?›|\W", "", text)) > 8:
                    yield text


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    names = [each.attr if isinstance(each, ast.Attribute) else each.id
             for each in ast.walk(inner) if isinstance(each, ast.Attribute | ast.Name)]  # fmt: skip
    return f"‹{(names or ['…'])[0].strip('_')}›"


PARTS: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "recipe": recipe,
    "recipes": recipes,
    "architectures": architectures,
    "messages": messages,
}
