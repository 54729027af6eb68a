"""Folders appear whole or not at all, also when the process is killed; copies and hashes are exact."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from linearize import formats
from linearize.checkpoint import atomic, copying, manifest, room
from linearize.errors import InputError


def model_folder(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)
    return path


def leftovers(parent: Path, *expected: str) -> set[str]:
    return {entry.name for entry in parent.iterdir()} - set(expected)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.50 KiB"), (3 << 30, "3.00 GiB"), (5 << 40, "5.00 TiB")],
)
def test_bytes_are_written_for_people(count: int, text: str) -> None:
    assert formats.format_bytes(count) == text


def test_output_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with atomic.output_folder(out) as folder:
        (folder / "x").write_text("1")
        assert not out.exists()
    assert [entry.name for entry in out.iterdir()] == ["x"]
    assert not leftovers(out.parent, "b")


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic.output_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        raise KeyError("x")
    assert not leftovers(tmp_path)


def test_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out")
    with pytest.raises(InputError, match="exists and is not empty; pass --overwrite"), atomic.output_folder(out):
        pytest.fail("the block ran")
    assert (out / "config.json").read_text() == "old"
    assert not leftovers(tmp_path, "out")


def test_empty_folder_counts_as_absent(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic.output_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "out" / "x").read_text() == "1"


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="is a file"):
        atomic.check_output(tmp_path / "out", overwrite=True)


def test_overwrite_swaps_and_spares_folders_without_a_model(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out")
    with pytest.raises(KeyError), atomic.output_folder(out, overwrite=True):
        raise KeyError("x")
    assert (out / "config.json").read_text() == "old"
    with atomic.output_folder(out, overwrite=True) as folder:
        (folder / "y").write_text("new")
        assert (out / "config.json").read_text() == "old"
    assert [entry.name for entry in out.iterdir()] == ["y"]
    with pytest.raises(InputError, match="replaces model folders only"):
        atomic.check_output(out, overwrite=True)
    assert not leftovers(tmp_path, "out")


def test_kill_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    replaced = model_folder(tmp_path / ".out.replaced")
    with pytest.raises(InputError, match="not empty"), atomic.output_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert not replaced.exists()


def test_killed_run_is_continued_only_with_its_key(tmp_path: Path) -> None:
    unfinished = tmp_path / ".out.partial"
    for key, kept in [("same", True), ("other", False), (None, False)]:
        unfinished.mkdir()
        (unfinished / ".key").write_text("same")
        for name in ("done", "half", ".hidden"):
            (unfinished / name).write_text("1")
        with pytest.raises(KeyError), atomic.output_folder(tmp_path / "out", key=key, keep="do*") as folder:
            assert {entry.name for entry in folder.iterdir()} == ({".key", "done"} if kept else {".key"})
            raise KeyError("x")


def test_two_writers_of_one_folder_are_refused(tmp_path: Path) -> None:
    with atomic.output_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        told = "another process is writing here .process"
        with pytest.raises(InputError, match=told), atomic.output_folder(tmp_path / "out"):
            pytest.fail("the block ran")
        assert (folder / "x").exists()
    assert (tmp_path / "out" / "x").exists()


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    wrapped = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (OSError(errno.ENOSPC, "full"), wrapped):
        with pytest.raises(InputError, match="disk became full"), atomic.output_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("1")
            raise error
        assert not leftovers(tmp_path)


def test_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"), atomic.output_folder(tmp_path / "file" / "out"):
        pytest.fail("the block ran")


def test_space_is_checked_where_the_folder_will_be(tmp_path: Path) -> None:
    room.check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(InputError, match="needs 1024.00 TiB and the disk has"):
        room.check_space(tmp_path / "not" / "there", 1 << 50)


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from linearize.checkpoint.atomic import output_folder
out, chance = Path(sys.argv[1]), random.Random(0)
for _ in range(40):
    ready, done = os.pipe()
    child = os.fork()  # many kills for one start of Python
    while not child:
        with output_folder(out, overwrite=True) as folder:
            for name in ("config.json", "one", "two", "three"):
                (folder / name).write_text(name)
        os.write(done, b".")
    os.read(ready, 1)  # the first round is done, so the kill falls into a swap of one folder for another
    time.sleep(chance.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(json.dumps([os.listdir(out) if out.exists() else [], os.listdir(out.parent)]))
"""


def test_after_a_kill_at_any_moment_the_folder_is_whole_or_absent(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.run([sys.executable, "-c", KILLED, out], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    listings = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(listings) == 40
    assert all(set(inside) in (set(), {"config.json", "one", "two", "three"}) for inside, _ in listings)
    assert {name for _, beside in listings for name in beside} <= {"out", ".out.partial", ".out.replaced", ".out.lock"}
    with atomic.output_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("")
    assert not leftovers(tmp_path, "out")


@pytest.fixture
def blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(copying, "CHUNK", 1000)
    path = tmp_path / "blob"
    path.write_bytes(random.Random(1).randbytes(12_345))
    return path


def test_copy_is_exact_and_hashed(blob: Path) -> None:
    advanced: list[int] = []
    digest = copying.copy(blob, blob.with_name("copy"), advanced.append)
    assert blob.with_name("copy").read_bytes() == blob.read_bytes()
    assert digest == hashlib.sha256(blob.read_bytes()).hexdigest() == copying.sha256(blob)
    assert sum(advanced) == 12_345
    assert max(advanced) <= 1000
    assert not leftovers(blob.parent, "blob", "copy")


def test_a_source_that_changes_while_it_is_copied_is_refused(blob: Path) -> None:
    def digest(source: Path, advance: object) -> str:
        os.truncate(source, 100)
        return copying.sha256(source)

    with pytest.raises(InputError, match="changed while it was copied"):
        copying.copy(blob, blob.with_name("copy"), digest=digest)
    assert not blob.with_name("copy").exists()


def test_copy_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert (
        copying.copy(tmp_path / "empty", tmp_path / "copy")
        == hashlib.sha256(b"").hexdigest()
        == copying.sha256(tmp_path / "copy")
    )


def test_other_errors_of_a_copy_are_not_hidden(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="full"):
        copying.copy(blob, blob.with_name("copy"))
    assert not blob.with_name("copy").exists()


def test_corrupt_download_is_found_while_it_is_copied(blob: Path) -> None:
    blobs = blob.parent / "blobs"
    blobs.mkdir()
    good, bad = hashlib.sha256(blob.read_bytes()).hexdigest(), "0" * 64
    for name in (good, bad):
        (blobs / name).write_bytes(blob.read_bytes())
        link = blob.with_name(name[:4])
        link.symlink_to(blobs / name)
    assert copying.copy(blob.with_name(good[:4]), blob.with_name("copy")) == good
    with pytest.raises(InputError, match="download is corrupt"):
        copying.copy(blob.with_name("0000"), blob.with_name("other"))
    assert not blob.with_name("other").exists()


def test_link_shares_the_bytes_and_knows_only_free_hashes(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = blob.with_name("linked")
    assert copying.link(blob, target) is None
    assert target.samefile(blob)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match="cross-device link.*leave out --link"):
        copying.link(blob, target)


def test_manifest_finds_every_change(tmp_path: Path) -> None:
    for name in ("same", "changed", "longer", "gone", "unhashed"):
        (tmp_path / name).write_text("1234")
    for _ in range(2):  # the second time there is a manifest already
        manifest.write_manifest(tmp_path, {"source": {"id": "x"}}, {"unhashed": None})
    assert manifest.verify(tmp_path) == []
    (tmp_path / "changed").write_text("4321")
    (tmp_path / "longer").write_text("12345")
    (tmp_path / "gone").unlink()
    (tmp_path / "unhashed").write_text("4321")
    problems = dict(problem.split(": ", 1) for problem in manifest.verify(tmp_path))
    assert set(problems) == {"changed", "longer", "gone"}
    assert "sha256 differs" in problems["changed"]
    assert "has 5 bytes, 4 were written" in problems["longer"]
    assert "missing" in problems["gone"]


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"files": [1]}'])
def test_folder_without_a_manifest_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / manifest.MANIFEST).write_text(content)
    with pytest.raises(InputError, match="holds no linearize.json|is not a manifest"):
        manifest.verify(tmp_path)
