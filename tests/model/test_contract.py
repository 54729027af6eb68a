"""What the rest of the package asks of a mixer: facts that its class states, never its name."""

import re
from pathlib import Path

import pytest

import linearize
from linearize.errors import InputError
from linearize.model.mixers import MIXERS, build_config
from linearize.recovery.calibrate import Watched
from linearize.recovery.parts import Partly

PACKAGE = Path(linearize.__file__).parent
ASKS = re.compile(r"""(\.name|\["name"\]) *[!=]= *["']softmax["']""")


def test_only_the_control_keeps_its_sources_cache() -> None:
    assert {name for name, cls in MIXERS.items() if cls.keeps_source_cache} == {"softmax"}


def test_what_is_called_instead_of_a_mixer_states_it_and_takes_no_name() -> None:
    for stand_in in (Watched, Partly):
        assert stand_in.keeps_source_cache is True
        assert not hasattr(stand_in, "name")


def test_nobody_compares_a_mixers_name() -> None:
    assert ASKS.search('if m.mixer.name != "softmax"') and ASKS.search("""values["name"] == 'softmax'""")
    files = {path.name for path in PACKAGE.rglob("*.py") if ASKS.search(path.read_text(encoding="utf-8"))}
    assert not files, f"{files}: ask keeps_source_cache"


def test_nothing_narrows_a_type_by_assert() -> None:
    files = [*(PACKAGE / "model").glob("*.py"), PACKAGE / "autoload.py", PACKAGE / "conversion" / "probe.py"]
    for path in files:
        assert not re.search(r"^\s*assert ", path.read_text(encoding="utf-8"), flags=re.MULTILINE), path


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "glaa"}, "Did you mean 'gla'"),
        ({"name": "gla", "window": 0, "sinks": -1}, "window: found 0; expected at least 1; mixer.sinks: found -1"),
        ({"name": "gla", "window": "64"}, "expected int"),
        ({"name": "gla", "sinks": True}, "expected int"),
        ({"name": "gla", "combine": "both"}, "allowed: memory, liger, none"),
        ({"name": "window", "combine": "liger"}, "allowed: none"),
    ],
)
def test_bad_mixers_are_named(values: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        build_config(values)
