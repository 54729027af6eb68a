"""Outputs behind links and on mount points, two processes on one output, leftovers of kills, and flushing."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import save_converted
from helpers.training import recipe_for

from linearize.checkpoint import atomic
from linearize.checkpoint.open import open_config
from linearize.checkpoint.sources import locate
from linearize.errors import InputError, disk_error
from linearize.recovery.train import train


def write(out: Path, name: str = "config.json", **options) -> None:
    with atomic.output_folder(out, **options) as folder:
        (folder / name).write_text(name)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# --- outputs that are something else than a name in a folder ---


def test_a_link_stays_and_the_files_land_in_its_target(tmp_path: Path) -> None:
    (tmp_path / "disk" / "target").mkdir(parents=True)
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / "target")
    write(out)
    write(out, "adapter_config.json", overwrite=True)
    assert out.is_symlink() and names(tmp_path / "disk" / "target") == {"adapter_config.json"}
    assert names(tmp_path) == {"disk", "out"} and names(tmp_path / "disk") == {"target"}
    assert atomic.working_folder(out) == tmp_path / "disk" / "target.training"


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    out = tmp_path / "mount"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    return out


def test_a_mount_point_is_filled_and_never_renamed(mount: Path) -> None:
    before = mount.stat().st_ino
    write(mount)
    with pytest.raises(InputError, match="not empty"):
        write(mount)
    with pytest.raises(KeyError), atomic.output_folder(mount, overwrite=True):
        raise KeyError
    assert names(mount) == {"config.json"}
    write(mount, "adapter_config.json", overwrite=True)
    assert names(mount) == {"adapter_config.json"} and mount.stat().st_ino == before
    assert names(mount.parent) == {"mount"}


def test_a_kill_while_a_mount_point_is_filled_is_undone(mount: Path) -> None:
    for folder, name in ((mount, "half"), (mount / ".replaced", "config.json"), (mount / ".partial", "rest")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("")
    atomic.put_back(mount)
    assert names(mount) == {"config.json", ".partial"}
    write(mount, "linearize.json", overwrite=True)
    assert names(mount) == {"linearize.json"}


# --- two processes ---

HOLD = """
import sys
from pathlib import Path
from linearize.checkpoint import atomic
with getattr(atomic, sys.argv[1])(Path(sys.argv[2])) as it:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["held", "locked", "output_folder"])
def test_the_second_process_is_told_who_the_first_is_until_it_dies(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", HOLD, how, tmp_path / "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        for hold in (atomic.held, atomic.output_folder):
            told = rf"another process .*\(process {process.pid} on "
            with pytest.raises(InputError, match=told), hold(tmp_path / "out"):
                pytest.fail("both have it")
        process.kill()
    write(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_what_a_process_holds_it_may_write(tmp_path: Path) -> None:
    with atomic.held(tmp_path / "new" / "out"):
        write(tmp_path / "new" / "out")
    with pytest.raises(InputError), atomic.held(tmp_path / "other" / "out"):
        raise InputError("bad input")
    assert names(tmp_path) == {"new"} and names(tmp_path / "new") == {"out"}


# --- leftovers ---


def test_a_folder_is_there_at_every_moment_of_a_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out")
    monkeypatch.setattr(Path, "rename", None)  # no two renames with a gap between them
    write(tmp_path / "out", "linearize.json", overwrite=True)
    assert names(tmp_path / "out") == {"linearize.json"} and names(tmp_path) == {"out"}


@pytest.mark.parametrize("exchange", [True, False])
def test_systems_without_an_exchange_of_names_take_two_renames(tmp_path, monkeypatch, exchange: bool) -> None:
    write(tmp_path / "out")
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    write(tmp_path / "out", "linearize.json", overwrite=True)
    assert names(tmp_path / "out") == {"linearize.json"} and names(tmp_path) == {"out"}


def test_what_a_kill_left_aside_is_put_back_but_not_under_a_writer(tmp_path: Path) -> None:
    out, aside = tmp_path / "out", tmp_path / ".out.replaced"
    write(aside)
    with atomic.locked(out):
        atomic.put_back(out)
        assert not out.exists()
    atomic.put_back(out)
    assert out.is_dir() and not aside.exists()
    write(aside)
    atomic.put_back(out)
    assert names(tmp_path) == {"out"}


STRANGERS = {
    "a file": lambda aside, model: aside.write_text("mine"),
    "a link to a model": lambda aside, model: aside.symlink_to(model),
    "a broken link": lambda aside, model: aside.symlink_to("nowhere"),
    "an empty folder": lambda aside, model: aside.mkdir(),
    "a folder of something else": lambda aside, model: write(aside, "notes.txt"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_no_swap_left_aside_stays_and_is_named(tmp_path: Path, monkeypatch, kind: str) -> None:
    out, aside, model = tmp_path / "out", tmp_path / ".out.replaced", tmp_path / "model"
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    write(model)
    STRANGERS[kind](aside, model)
    before = aside.lstat()
    calls = [lambda: open_config(out), lambda: locate(str(out)), lambda: write(out)]
    for call in calls:
        with pytest.raises(InputError, match=r"\.out\.replaced: stands where .*move it elsewhere"):
            call()
    assert aside.lstat() == before and names(tmp_path) == {"model", ".out.replaced"}
    model.rename(out)
    atomic.put_back(out)  # what is there can be read
    with pytest.raises(InputError, match="stands where"):
        write(out, overwrite=True)
    assert aside.lstat() == before and names(out) == {"config.json"}


@pytest.mark.parametrize("stop", range(6))
def test_a_kill_at_any_rename_on_a_mount_point_leaves_the_old_or_the_new(mount: Path, monkeypatch, stop: int) -> None:
    for name in ("config.json", "linearize.json", "weights"):
        (mount / name).write_text("old")
    rename, count = Path.rename, iter(range(100))

    def killed(path: Path, target: Path) -> Path:
        if next(count) >= stop:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(atomic, "_put_back", lambda out: None)
        with pytest.raises(KeyboardInterrupt):
            write(mount, overwrite=True)
    atomic.put_back(mount)
    assert names(mount) == {"config.json", "linearize.json", "weights"}
    assert all((mount / name).read_text() == "old" for name in names(mount))


@pytest.mark.parametrize("reader", ["open", "convert", "train"])
def test_every_reader_finds_a_folder_that_a_kill_left_aside(tmp_path: Path, reader: str) -> None:
    model = save_converted(tmp_path / "model")
    model.rename(tmp_path / ".model.replaced")
    if reader == "open":
        assert open_config(model).model_type == "linearized"
    elif reader == "convert":
        assert locate(str(model)).path == model
    else:
        with pytest.raises(InputError, match="found nothing named"):
            train(model, recipe_for(tmp_path / "none.jsonl"), None, tmp_path / "out")
    assert names(tmp_path) == {"model"}


def test_leftovers_of_files_are_swept_and_files_being_written_are_not(tmp_path: Path) -> None:
    for name in ("tokens-1.bin.12345678.tmp", "tmpabc.tmp", ".gone.tmp.lock", "kept.bin"):
        (tmp_path / name).write_text("")
    with atomic.whole_file(tmp_path / "new") as file:
        atomic.sweep(tmp_path)
        file.write(b"1")
    assert names(tmp_path) == {"kept.bin", "new"}


# --- flushing, and what the system says ---


def test_files_are_flushed_before_the_folder_appears_and_its_parent_after(tmp_path, monkeypatch) -> None:
    flushed: list[tuple[str, bool]] = []
    out = tmp_path / "out"
    monkeypatch.setattr(atomic, "sync", lambda path: flushed.append((path.name, out.exists())))
    with atomic.output_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("")
    assert {("a", False), ("sub", False), (".out.partial", False)} == set(flushed[:-1])
    assert flushed[-1] == (tmp_path.name, True)
    flushed.clear()
    atomic.write_text(tmp_path / "text", "1")
    with atomic.whole_file(tmp_path / "file") as file:
        file.write(b"1")
    assert [name for name, _ in flushed][::2][0] == ".text.writing" and flushed[1][0] == flushed[3][0] == tmp_path.name


def test_flushing_is_on_but_for_tests(tmp_path, monkeypatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    write(tmp_path / "one")
    assert not calls
    monkeypatch.delenv("LINEARIZE_NO_FSYNC")
    write(tmp_path / "two")
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x", "/a"), "disk became full .*No space left on device: /a"),
        (OSError(errno.EDQUOT, "x"), "disk became full .*quota"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk became full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "disk became full"),
        (PermissionError(errno.EACCES, "x", "/a"), "could not be written .Permission denied: /a"),
        (OSError(errno.EROFS, "x"), "could not be written .Read-only file system"),
        (OSError(errno.EIO, "x"), "could not be written .Input/output error"),
    ],
)
def test_every_error_of_the_file_system_is_one_paragraph(tmp_path: Path, error: Exception, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised, atomic.output_folder(tmp_path / "out"):
        raise error
    assert "\n" not in str(raised.value) and not names(tmp_path)


def test_other_errors_are_not_the_file_systems() -> None:
    for error in (ConnectionResetError(errno.ECONNRESET, "x"), KeyError("a"), TimeoutError(), RuntimeError("CUDA")):
        assert disk_error(error) is None
