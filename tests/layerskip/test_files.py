"""Files and directories are replaced whole, and only those that this library wrote; journals outlive their writers."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip import _files
from layerskip._files import (
    MANIFEST,
    Journal,
    check_output,
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


def test_a_checkpoint_is_published_without_reading_it_again(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "weights").write_text("new")
    publish(folder, tmp_path / "checkpoint-1", checked=False)
    assert json.loads((tmp_path / "checkpoint-1" / MANIFEST).read_text()) == {"weights": None}
    assert not folder.exists()


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
        journal = Journal(path, {"seed": 1})
        assert journal.records == [{"text": "ä"}, 2]
        journal.append(3)
        journal.close()
        assert path.read_text().splitlines() == ['{"seed": 1}', '{"text": "ä"}', "2", "3"]

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
        with pytest.raises(BlockingIOError, match=r"another process is writing .*pairs\.partial"):
            Journal(path, {})
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
