"""Write files and directories atomically, and never remove what another program wrote."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "layerskip-files.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file and rename it, so that half a file never has this name. Make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner may read
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync(path.parent)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise OSError if the file ``path`` cannot be written, or exists without ``overwrite``. Call before the work."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, expected the name of a file to write")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; give another name, or --overwrite to replace it")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raise OSError if no files can be written into ``folder``, which need not exist yet."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, so nothing can be written into {folder}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} is not writable, so nothing can be written into {folder}")


@contextmanager
def replaced(*targets: Path) -> Iterator[list[Path]]:
    """Yield new directories to fill; publish all of them as ``targets`` at the end, and delete them after an error.

    If `publish` refuses one, all targets stay as they are, and so do the new directories.
    """
    scratches = [target.with_name(f".{target.name}.unfinished") for target in targets]
    pairs = list(zip(scratches, targets, strict=True))
    for scratch, target in pairs:
        if (aside := _aside(scratch)).exists():  # a kill between the three renames of `_exchange`
            aside.rename(scratch if target.exists() else target)
        _discard(scratch, target)
        scratch.mkdir(parents=True)
    try:
        yield scratches
    except BaseException:
        for scratch in scratches:
            shutil.rmtree(scratch)
        raise
    for step in (_prepare, _put, _discard):  # so that all are replaced within a moment
        for scratch, target in pairs:
            step(scratch, target)


def publish(scratch: Path, target: Path, checked: bool = True) -> None:
    """Replace the directory ``target`` by ``scratch``, on the same file system. A kill leaves the old or the new one.

    Files that others put into the old one are kept. With ``checked`` the manifest has digests, so that files changed
    later count as foreign; that reads all files once.

    Raises
    ------
    FileExistsError
        If `obstacle` has a reason, or foreign files have names of new ones; ``scratch`` stays.
    """
    _prepare(scratch, target, checked)
    _put(scratch, target)
    _discard(scratch, target)


def obstacle(directory: Path) -> str | None:
    """Why `publish` would not replace ``directory``: it was not published, or was changed since; None if it would."""
    if not directory.exists() and not directory.is_symlink():
        return None
    files = written(directory)
    if files is None:
        return f"{directory} exists, and was not written by layerskip; move it away"
    for name, digest in files.items():
        path = directory / name
        if digest is not None and path.exists() and digest_of(path) != digest:
            return f"{path} was changed after layerskip wrote it; move it away"
    return None


def written(directory: Path) -> dict[str, str | None] | None:
    """The manifest of ``directory``, names to digests; None if it has none."""
    if directory.is_symlink() or not (directory / MANIFEST).is_file():
        return None
    files: dict[str, str | None] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return files


def remove_written(directory: Path) -> None:
    """Remove a directory that `publish` made; files of others in it stay, without the manifest."""
    for leftover in directory.parent.glob(".*.removed"):  # of an interrupted removal
        _delete(leftover, written(leftover) or ())
    files = written(directory)
    if files is None:
        raise ValueError(f"{directory} has no {MANIFEST}, so it is not layerskip's to remove")
    if set(_files(directory)) <= files.keys():
        aside = directory.with_name(f".{directory.name}.removed")
        directory.rename(aside)  # a partly deleted directory must not look complete
        _delete(aside, files)
    else:
        (directory / MANIFEST).unlink()
        _delete(directory, files)


def digest_of(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def _files(directory: Path) -> list[str]:
    """Relative names of all files and links below, except the manifest."""
    below = (Path(folder) / name for folder, folders, names in os.walk(directory) for name in (*folders, *names))
    found = (path for path in below if path.is_symlink() or not path.is_dir())
    return sorted(str(path.relative_to(directory)) for path in found if path != directory / MANIFEST)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prepare(scratch: Path, target: Path, checked: bool = True) -> None:
    """Link the foreign files of ``target`` into ``scratch``, write its manifest, and sync all of it."""
    reason = obstacle(target)
    if reason is not None:
        raise FileExistsError(f"{reason}; the new files are in {scratch}")
    files = {name: digest_of(scratch / name) if checked else None for name in _files(scratch)}
    foreign = set(_files(target)) - (written(target) or {}).keys() if target.exists() else set()
    for name in sorted(foreign):
        if name in files:
            raise FileExistsError(f"{target / name} was not written by layerskip, and is in the way; move it away")
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(target / name, scratch / name, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(target / name, scratch / name, follow_symlinks=False)
    (scratch / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    for name in (*files, MANIFEST):
        _sync(scratch / name)
    for folder, _, _ in os.walk(scratch):
        _sync(Path(folder))


def _put(scratch: Path, target: Path) -> None:
    """Move ``scratch`` to ``target``, and an older ``target`` to ``scratch``."""
    if target.exists():
        _exchange(scratch, target)
    else:
        scratch.rename(target)
    _sync(target.parent)


def _exchange(one: Path, two: Path) -> None:
    """Swap two directories by one system call, or by three renames if the file system does not support it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(one), None, str(two))
    aside = _aside(one)
    two.rename(aside)
    one.rename(two)
    aside.rename(one)


def _aside(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name}-old")


def _discard(scratch: Path, target: Path) -> None:
    """Remove a replaced or unfinished directory; its foreign files must be in ``target``, too."""
    if not scratch.exists():
        return
    files = written(scratch)
    if files is None:  # never published: all of it is layerskip's, or a link
        shutil.rmtree(scratch)
        return
    foreign = set(_files(scratch)) - files.keys()
    for name in foreign:
        if not (target / name).exists():  # created while the directories were exchanged
            raise FileExistsError(f"{scratch / name} was not written by layerskip; move it away")
    _delete(scratch, (*foreign, *files))


def _delete(directory: Path, names: Iterable[str]) -> None:
    """Delete files, the manifest last, then empty directories."""
    for name in (*names, MANIFEST):
        (directory / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(directory, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys whose values differ, with both values; empty if none does."""
    keys = [key for key in dict.fromkeys((*now, *before)) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)


class Journal:
    """A file with one JSON record a line, each synced before the next; the first line describes the work.

    Parameters
    ----------
    path : Path
        An existing journal of the same work is continued; an incomplete last line is dropped.
    work : mapping
        What the records depend on, as JSON.
    overwrite : bool
        Replace a journal of other work; one without records is always replaced.

    Raises
    ------
    ValueError
        For a journal of other work (with the differences), or a file that is no journal.
    BlockingIOError
        If another process is writing it.
    """

    def __init__(self, path: Path, work: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        if not path.exists():
            write_atomically(path, _line(work))
        changed = differences(self._open(), work)
        if changed:
            self._file.close()
            if self.records and not overwrite:
                raise ValueError(f"{path} holds records of other work: {changed}; --overwrite to begin anew")
            write_atomically(path, _line(work))
            self._open()

    def _open(self) -> dict[str, Any]:
        """Read the records, open the file to append; return the work."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            work, *self.records = map(json.loads, whole.splitlines())
        except ValueError as error:
            raise ValueError(f"{self.path} is no journal of records: {error}") from error
        if not isinstance(work, dict):
            raise ValueError(f"{self.path} is no journal of records: it begins with {work!r}")
        self._file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another process is writing {self.path}") from error
        self._file.truncate(len(whole))
        return work

    def append(self, record: Any) -> None:
        """Write a record and sync it."""
        self._file.write(_line(record))
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        """Let another process write; delete the file if it has no records."""
        self._file.close()
        if not self.records:
            self.path.unlink()

    def remove(self) -> None:
        """Delete the file, after the result of its records is written."""
        self._file.close()
        self.path.unlink()


def _line(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
