"""A window that no memory holds is refused before anything is built or written."""

from pathlib import Path

import pytest
from helpers.tiny import save_source

from linearize.checkpoint import room
from linearize.checkpoint.sources import locate
from linearize.conversion.plan import plan
from linearize.errors import InputError
from linearize.recipe import load as recipes


@pytest.mark.parametrize(("window", "sinks"), [(2_000_000, 4), (2_147_483_647, 4), (2000, 2_000_000)])
@pytest.mark.parametrize("mixer", ["gla", "window"])
def test_a_cache_beyond_all_memory(
    window: int, sinks: int, mixer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "memory", lambda device=None: 64 << 20)
    save_source(tmp_path / "source", layers=2)
    located = locate(str(tmp_path / "source"))
    values = {"name": mixer, "window": window, "sinks": sinks}
    wanted = recipes.from_dict({"source": {"id": "x"}, "convert": {"mixer": values}})
    with pytest.raises(InputError, match=r"convert.mixer.window: .* one row needs at least .* 64.00 MiB"):
        plan(located, wanted)


def test_a_window_as_wide_as_the_text_is_no_mistake(tmp_path: Path) -> None:
    save_source(tmp_path / "source", layers=2)
    wanted = recipes.from_dict({"source": {"id": "x"}, "convert": {"mixer": {"name": "window", "window": 4096}}})
    assert plan(locate(str(tmp_path / "source")), wanted).layers == [0, 1]
