"""What ends a command: exit code 2 for bad input, 70 for a fault of ours, never 1, which is an answer."""

import subprocess
import sys

import pytest
import torch

from linearize import cli, verbs
from linearize.errors import InputError


def ended(monkeypatch: pytest.MonkeyPatch, error: BaseException, *before: str) -> int | str | None:
    """Exit code of `linearize inspect` when the function behind it raises."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(verbs, "inspect", fail)
    monkeypatch.setattr(sys, "argv", ["linearize", *before, "inspect", "x"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RuntimeError("a\nb\x1b[31m"), AssertionError(), EOFError("short"), RecursionError("deep"),
     OSError(2, "No such file"), SystemExit("library gave up"), ExceptionGroup("several", [ValueError("x")])],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_fault_is_one_line_and_says_what_to_report(error: BaseException, monkeypatch, capsys) -> None:
    monkeypatch.delenv("LINEARIZE_DEBUG", raising=False)
    assert ended(monkeypatch, error) == 70
    text = capsys.readouterr()
    assert not text.out and text.err.count("\n") == 1 and "\x1b" not in text.err and "Traceback" not in text.err
    assert "linearize doctor" in text.err and "linearize --debug" in text.err


@pytest.mark.parametrize("number", [28, 13, 30, 5])
def test_what_the_file_system_refuses_is_no_fault(number: int, monkeypatch, capsys) -> None:
    assert ended(monkeypatch, OSError(number, "told", "/somewhere")) == 2
    assert "/somewhere; free some space, or name a folder" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["option", "variable"])
def test_the_traceback_is_behind_debug(way: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LINEARIZE_DEBUG", "1" if way == "variable" else "0")
    assert ended(monkeypatch, KeyError("x"), *["--debug"] * (way == "option")) == 70
    assert "Traceback" in capsys.readouterr().err
    assert ended(monkeypatch, InputError("bad: x")) == 2  # the variable stands for the processes of a launcher
    text = capsys.readouterr().err
    assert "Traceback" in text and text.endswith("Error: bad: x\n")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_memory_that_does_not_suffice_has_a_sentence_of_its_own(error: Exception, monkeypatch, capsys) -> None:
    assert ended(monkeypatch, error) == 70
    assert "not enough memory" in capsys.readouterr().err


def test_bad_input_shows_no_escapes(monkeypatch, capsys) -> None:
    assert ended(monkeypatch, InputError("a\x1b[2J: found \u202ex\nb: second line")) == 2
    assert capsys.readouterr().err == "Error: a\\x1b[2J: found \\u202ex\nb: second line\n"


@pytest.mark.parametrize("verb", [["--help"], ["convert", "--help"], ["archs"]], ids=" ".join)
def test_a_closed_pipe_is_quiet(verb: list[str]) -> None:
    code = f"import sys; sys.argv = ['linearize', *{verb}]; from linearize.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
