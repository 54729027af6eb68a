"""A window that no memory holds is refused before anything is built or written."""

import json
from pathlib import Path

import pytest
from helpers.tiny import save_source

from linearize.checkpoint import room
from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
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


@pytest.mark.parametrize("change", [{"padding_side": "up"}, {"model_max_length": "many"}])
def test_a_tokenizer_that_cannot_be_opened_is_noticed_before_the_conversion(change: dict, tmp_path: Path) -> None:
    file = save_source(tmp_path / "source", layers=2) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    wanted = recipes.from_dict({"source": {"id": "x"}})
    with pytest.raises(InputError, match="the tokenizer cannot be read"):
        convert(locate(str(tmp_path / "source")), wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_kernel_of_the_hub_in_a_configuration_is_refused(tmp_path: Path) -> None:
    file = save_source(tmp_path / "source", layers=2) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "some-one/kernel"}))
    with pytest.raises(InputError, match="attn_implementation is 'some-one/kernel', code on the Hub"):
        plan(locate(str(tmp_path / "source")), recipes.from_dict({"source": {"id": "x"}}))
