"""What a user did wrong is a ValueError of one paragraph, which no handler of this package turns into another one."""

import json
from pathlib import Path

import pytest

from linearize.checkpoint.reading import reading
from linearize.checkpoint.sources import locate, read_config
from linearize.errors import InputError, suggest


def test_callers_may_catch_it_as_a_value_error():
    with pytest.raises(ValueError, match="a: found b"):
        raise InputError("a: found b")


def test_it_passes_handlers_of_value_errors_unchanged(tmp_path: Path):
    with pytest.raises(InputError, match="^one paragraph$"), reading("folder", "cannot be read", "try again"):
        raise InputError("one paragraph")
    expected = "^folder: cannot be read .no number.; try again$"
    with pytest.raises(InputError, match=expected), reading("folder", "cannot be read", "try again"):
        raise ValueError("no number")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(InputError, match=r"config.json: names no model_type, so the architecture is unknown; add it"):
        read_config(locate(str(tmp_path)))


def test_suggestions() -> None:
    assert suggest("GLA", ["gla", "window"]) == "Did you mean 'gla'? Available: gla, window"
    assert suggest("xyz", ["gla"]) == "Available: gla"
    assert suggest("gla", []) == "Available: none"
