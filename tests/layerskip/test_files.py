"""Files and directories are replaced whole, and only those that this library wrote; journals outlive their writers."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerskip import _files
from layerskip._files import (
    MANIFEST,
    Journal,
    check_output,
    lock,
    obstacle,
    publish,
    remove_written,
    replaced,
    write_atomically,
)

SCRIPT = Path(__file__).with_name("killed_saving.py")


def tree(folder: Path) -> dict[str, bytes]:
    """All files below but manifests."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write(target: Path, **files: str) -> None:
    with replaced(target) as [folder]:
        for name, text in files.items():
            (folder / name).write_text(text)


class _NoExchange:
    """Stands for a C library without renameat2."""

    def __init__(self, *args: object, **options: object) -> None:
        pass


@pytest.fixture(params=["one system call", "three renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "three renames":
        monkeypatch.setattr(ctypes, "CDLL", _NoExchange)
    return request.param


def test_a_file_is_written_whole_into_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert tree(tmp_path) == {"a/b.txt": b"two"}


def test_outputs_that_could_not_be_written_are_named_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    check_output(file, overwrite=True)
    check_output(tmp_path / "new" / "folder" / "file", overwrite=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match="file exists; give another name, or --overwrite"):
        check_output(file, overwrite=False)
    with pytest.raises(IsADirectoryError, match="is a directory"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(NotADirectoryError, match="file is a file, so nothing can be written into"):
        check_output(file / "below" / "it", overwrite=False)


def test_a_directory_is_replaced_and_what_others_put_there_stays(tmp_path: Path, exchange: str) -> None:
    target = tmp_path / "model"
    write(target, weights="old", config="old", extra="old")
    (target / "NOTES.md").write_text("mine")
    (target / "mine").mkdir()
    (target / "mine" / "more").write_text("mine")
    (target / "link").symlink_to("mine", target_is_directory=True)
    write(target, weights="new", config="new")
    mine = {"NOTES.md": b"mine", "mine/more": b"mine"}
    assert tree(target) == {"weights": b"new", "config": b"new", **mine}
    assert os.readlink(target / "link") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_while_writing_leaves_the_old_directory_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write(target, weights="old")

    def interrupted() -> None:
        with replaced(target) as [folder]:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tree(tmp_path) == {"model/weights": b"old"}


def test_what_others_wrote_or_changed_is_not_replaced(tmp_path: Path) -> None:
    theirs, changed, filled = tmp_path / "theirs", tmp_path / "changed", tmp_path / "filled"
    theirs.mkdir()
    (theirs / "weights").write_text("mine")
    write(changed, weights="old")
    (changed / "weights").write_text("mine")
    write(filled, weights="old")
    (filled / "config").write_text("mine")
    assert obstacle(tmp_path / "nothing") is obstacle(filled) is None
    messages = {
        theirs: "theirs exists, and was not written by layerskip",
        changed: "changed/weights was changed after layerskip wrote it",
        filled: "filled/config was not written by layerskip, and is in the way",
    }
    for target, message in messages.items():
        before = tree(target)
        with pytest.raises(FileExistsError, match=message):
            write(target, weights="new", config="new")
        assert tree(target) == before
        assert (target.with_name(f".{target.name}.unfinished") / "weights").read_text() == "new"


def test_of_several_directories_none_is_replaced_where_one_cannot_be(tmp_path: Path) -> None:
    one, two = tmp_path / "adapter", tmp_path / "model"
    write(one, weights="old")
    two.mkdir()
    (two / "weights").write_text("mine")

    def both() -> None:
        with replaced(one, two) as folders:
            for folder in folders:
                (folder / "weights").write_text("new")

    with pytest.raises(FileExistsError, match="model exists"):
        both()
    assert (one / "weights").read_text() == "old"
    assert (two / "weights").read_text() == "mine"


def test_a_removal_leaves_what_others_put_there(tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        write(tmp_path / name, weights="old")
    (tmp_path / "checkpoint-2" / "NOTES.md").write_text("mine")
    for name in ("checkpoint-1", "checkpoint-2"):
        remove_written(tmp_path / name)
    assert tree(tmp_path) == {"checkpoint-2/NOTES.md": b"mine"}
    assert not (tmp_path / "checkpoint-1").exists()
    with pytest.raises(ValueError, match="not layerskip's to remove"):
        remove_written(tmp_path / "checkpoint-2")


def test_a_removal_that_was_cut_short_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        write(tmp_path / name, weights="old")
    with monkeypatch.context() as patch:
        patch.setattr(_files, "_delete", lambda directory, names: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            remove_written(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists(), "half of one must not look like a whole one"
    remove_written(tmp_path / "checkpoint-2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("renames", [1, 2])
def test_without_an_exchange_the_next_writer_repairs_what_a_kill_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Both directories are whole meanwhile, the old one at another name for a moment."""
    target = tmp_path / "model"
    write(target, weights="old")
    (target / "NOTES.md").write_text("mine")
    rename, done = Path.rename, []

    def counted(self: Path, other: Path) -> Path:
        if len(done) == renames:
            raise SystemExit
        done.append(self)
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", _NoExchange)
        patch.setattr(Path, "rename", counted)
        with pytest.raises(SystemExit):
            write(target, weights="new")
    assert target.exists() == (renames == 2)
    write(target, weights="newer")
    assert tree(tmp_path) == {"model/weights": b"newer", "model/NOTES.md": b"mine"}


def test_a_checkpoint_is_published_without_reading_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "weights").write_text("new")
    monkeypatch.setattr(_files, "digest_of", None)
    publish((folder, tmp_path / "checkpoint-1"), hashed=False)
    status = (tmp_path / "checkpoint-1" / "weights").stat()
    manifest = json.loads((tmp_path / "checkpoint-1" / MANIFEST).read_text())
    assert manifest == {"weights": f"stat 3 {status.st_mtime_ns}"}
    assert not folder.exists()
    assert obstacle(tmp_path / "checkpoint-1") is None
    (tmp_path / "checkpoint-1" / "weights").write_text("new")
    assert "weights was changed after" in str(obstacle(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("name", ["../victim", "ABSOLUTE"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    target, victim = tmp_path / "model", tmp_path / "victim"
    victim.write_text("mine")
    write(target, weights="old")
    name = str(victim) if name == "ABSOLUTE" else name
    manifest = {name: _files.digest_of(victim), **json.loads((target / MANIFEST).read_text())}
    (target / MANIFEST).write_text(json.dumps(manifest))
    for work in (obstacle, remove_written, lambda target: write(target, weights="new")):
        with pytest.raises(ValueError, match=f"names '{name}', which is not a file of this directory"):
            work(target)
    assert victim.read_text() == "mine"


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    target, other = tmp_path / "checkpoint-1", tmp_path / "other"
    write(target, weights="old")
    other.mkdir()
    (other / "victim").write_text("mine")
    (target / "link").symlink_to(other, target_is_directory=True)
    manifest = {"link/victim": _files.digest_of(other / "victim"), **json.loads((target / MANIFEST).read_text())}
    (target / MANIFEST).write_text(json.dumps(manifest))
    remove_written(target)
    assert tree(tmp_path) == {"other/victim": b"mine"}
    assert (target / "link").is_symlink()


def test_files_without_a_digest_are_neither_replaced_nor_removed(tmp_path: Path) -> None:
    """As manifests of older versions have them for checkpoints."""
    target = tmp_path / "checkpoint-1"
    write(target, weights="old")
    (target / MANIFEST).write_text('{"weights": null}')
    assert f"weights has no digest in {MANIFEST}; move it away" in str(obstacle(target))
    with pytest.raises(FileExistsError, match="has no digest"):
        write(target, weights="new")
    with pytest.warns(UserWarning, match="checkpoint-1 stays: no file in it is as its"):
        remove_written(target)
    assert (target / "weights").read_text() == "old"
    assert (target / MANIFEST).exists(), "the checkpoint is whole"


@pytest.mark.parametrize("manifest", ["prose", "[1]", '{"weights": 3}'])
def test_a_broken_manifest_is_named(tmp_path: Path, manifest: str) -> None:
    write(tmp_path / "model", weights="old")
    (tmp_path / "model" / MANIFEST).write_text(manifest)
    with pytest.raises(ValueError, match=rf"model/{MANIFEST}[ :]"):
        write(tmp_path / "model", weights="new")
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_removal_leaves_changed_files_and_directories_of_other_names(tmp_path: Path) -> None:
    for name in ("checkpoint-1", ".notes.removed", ".checkpoint-7.removed"):
        write(tmp_path / name, weights="old", config="old")
    for name in ("checkpoint-1", ".checkpoint-7.removed"):
        (tmp_path / name / "weights").write_text("mine")
    remove_written(tmp_path / "checkpoint-1")
    kept = {"checkpoint-1/weights": b"mine", ".checkpoint-7.removed/weights": b"mine"}
    assert tree(tmp_path) == {**kept, ".notes.removed/weights": b"old", ".notes.removed/config": b"old"}


def test_all_new_files_and_the_manifest_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = _files._sync
    monkeypatch.setattr(_files, "_sync", lambda path: (synced.append(path.name), sync(path)))
    write(tmp_path / "model", weights="new", config="new")
    assert set(synced) == {"weights", "config", MANIFEST, ".model.unfinished", tmp_path.name}
    assert synced[-1] == tmp_path.name, "the new name comes last"


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    target, link = tmp_path / "run" / "model", tmp_path / "link"
    write(target, weights="old")
    link.symlink_to(tmp_path / "run", target_is_directory=True)
    for given in (target, link / "model", target / "weights"):
        with pytest.raises(FileExistsError, match=f"is or holds the input {given}; give another output"):
            check_output(target, True, ("smollm2", None, given), directory=True)
    with pytest.raises(FileExistsError, match="is or holds the input"):
        check_output(link / "model", True, (target,), directory=True)
    with pytest.raises(FileExistsError, match="is or holds the input"):
        check_output(target / "weights", True, (link / "model" / "weights",))
    check_output(target / "tuning", False, (target,))
    check_output(target, True, (tmp_path / "run",), directory=True)
    with pytest.raises(FileExistsError, match="--overwrite to replace it"):
        check_output(target, False, directory=True)


class TestLock:
    def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        path = tmp_path / "made" / "run"
        with lock(path), pytest.raises(BlockingIOError, match=rf"writing .*made/run \(process id {os.getpid()}\)"):  # noqa: SIM117
            with lock(path):
                pass
        assert not path.parent.exists(), "nothing was written there"
        with lock(path):
            path.write_text("x")
        assert [one.name for one in path.parent.iterdir()] == ["run"]

    def test_a_dead_process_is_no_obstacle(self, tmp_path: Path) -> None:
        child = os.fork()
        if child == 0:
            with lock(tmp_path / "run"):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert (tmp_path / ".run.lock").read_text() == str(child)
        with lock(tmp_path / "run"):
            assert (tmp_path / ".run.lock").read_text() == str(os.getpid())
        assert list(tmp_path.iterdir()) == []

    def test_a_file_system_without_locks_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(handle: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refused)
        with pytest.warns(UserWarning, match="has no locks: let no other process write .*run"), lock(tmp_path / "run"):
            pass

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "victim").write_text("mine")
        (tmp_path / ".run.lock").symlink_to("victim")
        with pytest.raises(OSError, match=r"\.run\.lock"), lock(tmp_path / "run"):
            pass
        assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.slow
def test_a_kill_at_any_point_of_saving_leaves_the_old_or_the_new_and_the_next_save_is_whole(tmp_path: Path) -> None:
    """Processes save a trained model over an older one, and are killed at one file operation after the other."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    points = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert len(points) >= 20
    assert all(point["signal"] == signal.SIGKILL for point in points)
    for name in ("adapter", "model"):
        seen = [point[name] for point in points]
        assert set(seen) == {"old", "new"}, seen
        assert seen == sorted(seen, reverse=True), "the new one does not go away again"
    assert all(point["notes"] and point["then"] == ["new", "new", ["adapter", "model"]] for point in points), points


class TestJournal:
    def test_it_goes_on_behind_what_is_there(self, tmp_path: Path) -> None:
        path = tmp_path / "made" / "pairs.partial"
        journal = Journal(path, {"seed": 1})
        journal.append({"text": "ä"})
        journal.append(2)
        journal.close()
        with path.open("ab") as file:
            file.write(b'{"cut in the mid')  # of a writer that was killed
        with pytest.warns(UserWarning, match=r"pairs\.partial: skipped line 4, which was cut off"):
            journal = Journal(path, {"seed": 1})
        assert journal.records == [{"text": "ä"}, 2]
        assert not journal.torn
        journal.append(3)
        journal.close()
        assert path.read_text().splitlines() == ['{"seed": 1}', '{"text": "ä"}', "2", "3"]

    def test_a_record_is_written_whole_or_not_at_all(self, tmp_path: Path) -> None:
        """Where the disk takes three bytes at a time, and then is full."""
        journal = Journal(tmp_path / "pairs.partial", {})
        file, room = journal._file, 20

        class Full:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, data: memoryview) -> int:
                nonlocal room
                if room <= 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                room -= 3
                return file.write(data[:3])

        journal._file = Full()
        journal.append("twelve bytes")
        with pytest.raises(OSError, match="No space left"):
            journal.append("more than there is room for")
        room = 100
        journal.append("after")
        journal.close()
        assert (tmp_path / "pairs.partial").read_text() == '{}\n"twelve bytes"\n"after"\n'
        assert Journal(tmp_path / "pairs.partial", {}).records == ["twelve bytes", "after"]

    def test_a_line_that_cannot_be_read_is_skipped(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.partial"
        path.write_text('{}\n1\n{"cut"{"whole": 1}\n3\n')
        with pytest.warns(UserWarning, match=r"pairs\.partial: skipped line 3, which was cut off"):
            journal = Journal(path, {})
        assert journal.records == [1, 3]
        assert journal.torn

    def test_other_work_is_refused_or_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.partial"
        journal = Journal(path, {"seed": 1, "model": "a", "same": 0})
        journal.append(1)
        journal.close()
        with pytest.raises(ValueError, match="seed was 1 and is 2; model was 'a' and is 'b'; --overwrite"):
            Journal(path, {"seed": 2, "model": "b", "same": 0})
        assert path.read_text().splitlines()[1:] == ["1"]
        journal = Journal(path, {"seed": 2, "model": "a", "same": 0}, overwrite=True)
        assert journal.records == []
        journal.close()
        assert not path.exists(), "nothing was written"

    def test_one_without_records_is_in_nobodys_way(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.partial"
        path.write_text('{"seed": 1}\n')
        journal = Journal(path, {"seed": 2})
        journal.append(5)
        journal.close()
        assert path.read_text() == '{"seed": 2}\n5\n'

    def test_one_writer_at_a_time(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.partial"
        journal = Journal(path, {})
        before = path.read_bytes()
        for work in ({}, {"seed": 1}):
            with pytest.raises(BlockingIOError, match=r"another process is writing .*pairs\.partial"):
                Journal(path, work, overwrite=True)
        assert path.read_bytes() == before
        journal.append(1)
        journal.remove()
        assert not path.exists()

    @pytest.mark.parametrize("text", ["", "prose\n", "[1]\n"])
    def test_a_file_that_is_none_is_left_alone(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "pairs.partial"
        path.write_text(text)
        with pytest.raises(ValueError, match="is no journal of records"):
            Journal(path, {}, overwrite=True)
        assert path.read_text() == text
