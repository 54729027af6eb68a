"""The progress bar: silent where a block is quick, one line now and then where stderr is no terminal."""

import pytest

from linearize import progress
from linearize.progress import Bar, byte_progress, step_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then_where_stderr_is_no_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with step_progress("reading [1]", 5) as advance:
        for seconds in (1, 9, 11, 12, 25):
            clock[0] = seconds
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line[: line.index("/5") + 2] for line in lines] == ["  reading [1]  3/5", "  reading [1]  5/5"]
    with byte_progress("copying", 2_000_000_000) as advance:
        clock[0] = 60
        advance(500_000_000)
    assert capsys.readouterr().err.startswith("  copying  500.0 MB/2.0 GB")


def test_what_is_off_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Bar(False) as bar, step_progress("measuring", 2, enabled=False) as advance:
        clock[0] = 60
        bar.start("a", 2)
        bar.advance()
        bar.line("done")
        advance()
    assert capsys.readouterr().err == ""


def test_a_bar_without_a_total_and_with_another_text(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Bar() as bar:
        bar.advance()  # before anything has begun
        bar.start("a")
        clock[0] = 60
        bar.advance(text="b [x]")
        bar.expect(4)
        clock[0] = 120
        bar.advance()
        bar.line("student: 3 s")
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert [line[:3] for line in lines] == [["b", "[x]", "1/?"], ["b", "[x]", "2/4"], ["student:", "3", "s"]]
