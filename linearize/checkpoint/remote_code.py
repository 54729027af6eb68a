"""The code that a folder needs, as one file that it brings along: it opens with `trust_remote_code=True` where this
package is not installed.

The file holds every module of `linearize/model` as text, unchanged but for the names of imports. It needs torch and
transformers, nothing else.
"""

import re
from pathlib import Path
from typing import Any

from linearize.checkpoint import links
from linearize.checkpoint.reading import read_json
from linearize.version import __version__

NAME = "modeling_linearized"
FILE = f"{NAME}.py"
AUTO_MAP = {"AutoConfig": f"{NAME}.LinearizedConfig", "AutoModelForCausalLM": f"{NAME}.LinearizedForCausalLM"}

SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
SETTINGS += ("video_preprocessor_config.json", "generation_config.json")
"""Files whose `auto_map` names code."""

_ROOT = Path(__file__).parent.parent
_HEAD = f'''"""A linearized model: the source's own classes of transformers with other attention, for trust_remote_code.

Put together by linearize {__version__} (Apache-2.0) from its own modules, which stand in _MODULES as text. With the
package `linearize` installed this file is not read.
"""

import importlib
import importlib.util
import linecache
import re
import sys

_MODULES = {{}}
'''
_TAIL = '''

class _Finder:
    """Lets Python import the modules above, as a package of this file's own."""

    package = re.sub("[^a-zA-Z0-9_]", "_", f"{__name__}_runtime")

    def find_spec(self, fullname, path=None, target=None):
        name = fullname.removeprefix(self.package).removeprefix(".")
        if fullname.partition(".")[0] != self.package or name not in _MODULES:
            return None
        is_package = any(other.startswith(f"{name}.".lstrip(".")) for other in _MODULES if other != name)
        return importlib.util.spec_from_loader(fullname, self, is_package=is_package)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__.removeprefix(self.package).removeprefix(".")
        text = re.sub("^( *from )linearize(?=[. ])", rf"\\g<1>{self.package}", _MODULES[name], flags=re.MULTILINE)
        module.__file__ = __file__
        file = f"{__file__}:{name}"
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file  # Triton compiles what it reads
        exec(compile(text, file, "exec"), module.__dict__)


sys.meta_path.insert(0, _Finder())
_modeling = importlib.import_module(f"{_Finder.package}.model.modeling")
_modeling.live_in(__name__)
LinearizedConfig = _modeling.LinearizedConfig
LinearizedForCausalLM = _modeling.LinearizedForCausalLM
'''


def code() -> str:
    """The text of `modeling_linearized.py`: Python that defines LinearizedConfig and LinearizedForCausalLM."""
    files = [_ROOT / "errors.py", *sorted((_ROOT / "model").rglob("*.py"))]
    modules = {"": "", **{_name(file): _absolute(file) for file in files}}
    parts = [f"\n_MODULES[{name!r}] = {_quoted(text)}\n" for name, text in modules.items()]
    return "".join([_HEAD, *parts, _TAIL])


def asked(folder: Path) -> bool:
    """Whether a folder was asked to bring its code along: its configuration names the file that `code` gives.

    Adapters have no configuration of a model; beside them lies the file itself.
    """
    config = folder / "config.json"
    return read_json(config).get("auto_map") == AUTO_MAP if config.is_file() else (folder / FILE).is_file()


def foreign(folder: Path) -> list[str]:
    """Files of others' code in a folder: those that its settings name, and what they import from beside them.

    Those of its config.json are left out: they describe the source's model, which is another one here.
    """
    named, files = [], []
    for name in (name for name in SETTINGS[1:] if (folder / name).is_file()):
        entries = read_json(folder / name).get("auto_map") or {}
        for entry in entries.values() if isinstance(entries, dict) else [entries]:
            named += [str(part).partition(".")[0] for part in (entry if isinstance(entry, list) else [entry]) if part]
    while named:
        name = f"{named.pop()}.py"
        if name not in (FILE, *files) and Path(name).name == name and (folder / name).is_file():
            files.append(name)
            text = links.own(folder, folder / name).read_text(encoding="utf-8", errors="replace")
            named += re.findall(r"^\s*(?:from|import)\s+\.(\w+)", text, flags=re.MULTILINE)
    return sorted(files)


def without_foreign(values: dict[str, Any]) -> dict[str, Any]:
    """Settings without the keys that make transformers run others' code, where it is trusted."""
    kept = {key: value for key, value in values.items() if key not in ("auto_map", "custom_pipelines")}
    return {**kept, "auto_map": AUTO_MAP} if values.get("auto_map") == AUTO_MAP else kept


def _name(file: Path) -> str:
    parts = file.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _absolute(file: Path) -> str:
    """A module's text with absolute imports: transformers looks for files behind every relative one that it reads."""
    package = ["linearize", *file.relative_to(_ROOT).parent.parts]

    def absolute(match: re.Match[str]) -> str:
        above = package[: len(package) + 1 - len(match[2])]
        return f"{match[1]}{'.'.join([*above, match[3]] if match[3] else above)} import"

    return re.sub(r"^( *from )(\.+)(\S*) import", absolute, file.read_text(encoding="utf-8"), flags=re.MULTILINE)


def _quoted(text: str) -> str:
    return repr(text) if "'" * 3 in text or text.endswith(("\\", "'")) else f"r'''{text}'''"
