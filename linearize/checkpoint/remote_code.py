"""The code that a folder needs, as one file that it brings along: it opens with `trust_remote_code=True` where this
package is not installed.

The file holds every module of `linearize/model` as text, unchanged but for the names of imports. It needs torch and
transformers, nothing else.
"""

import re
from pathlib import Path
from typing import Any

from linearize.version import __version__

NAME = "modeling_linearized"
FILE = f"{NAME}.py"
AUTO_MAP = {"AutoConfig": f"{NAME}.LinearizedConfig", "AutoModelForCausalLM": f"{NAME}.LinearizedForCausalLM"}

_ROOT = Path(__file__).parent.parent
_HEAD = f'''"""A linearized model: the source's own classes of transformers with other attention, for trust_remote_code.

Put together by linearize {__version__} (Apache-2.0) from its own modules, which stand in _MODULES as text. With the
package `linearize` installed this file is not read.
"""

import importlib
import importlib.util
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
        exec(compile(text, f"{__file__}:{name}", "exec"), module.__dict__)


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


def auto_map(config: dict[str, Any]) -> dict[str, Any]:
    """A linearized configuration that names the code beside it."""
    return {**config, "auto_map": AUTO_MAP}


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
