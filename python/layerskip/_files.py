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
_CHUNK = 1 << 20


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside ``path`` under a temporary name, then rename: no reader ever sees half a file, not after a crash.

    A missing folder is made.
    """
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
    """See, before the work, that its result can be written to the file ``path``.

    Raises
    ------
    OSError
        Where nothing can be written there, or a file is there that may not be replaced (``overwrite``).
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, expected the name of a file to write")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; give another name, or --overwrite to replace it")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raise OSError where files can't be written into ``folder``, which need not be there yet."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, so nothing can be written into {folder}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} is not writable, so nothing can be written into {folder}")


@contextmanager
def replaced(*targets: Path) -> Iterator[list[Path]]:
    """New directories to fill. At the end of the block all are published as ``targets``; after an error they go.

    What `publish` refuses leaves all targets as they are, and the new directories, too.
    """
    scratches = [target.with_name(f".{target.name}.unfinished") for target in targets]
    for scratch, target in zip(scratches, targets, strict=True):
        _recover(target, scratch)
        _discard(scratch, target)
        scratch.mkdir(parents=True)
    try:
        yield scratches
    except BaseException:
        for scratch in scratches:
            shutil.rmtree(scratch)
        raise
    pairs = list(zip(scratches, targets, strict=True))
    for step in (_prepare, _put, _discard):  # so that all come into their places within a moment
        for scratch, target in pairs:
            step(scratch, target)


def publish(scratch: Path, target: Path, checked: bool = True) -> None:
    """Put a directory that was filled beside ``target`` in its place: a kill leaves the old one or the new one.

    Files that others put into the old one are in the new one, too.

    Parameters
    ----------
    scratch, target : Path
        On one file system.
    checked : bool
        Whether the manifest gets the files' digests, so that one that is changed later counts as its changer's. Takes
        reading everything once.

    Raises
    ------
    FileExistsError
        Where ``target`` is there and is no such directory, or others' files in it are in the way; see `obstacle`.
        ``scratch`` stays then.
    """
    _prepare(scratch, target, checked)
    _put(scratch, target)
    _discard(scratch, target)


def obstacle(directory: Path) -> str | None:
    """Why `publish` would not replace ``directory``, or None: it was not published, or what was has been changed."""
    if not directory.exists() and not directory.is_symlink():
        return None
    files = written(directory)
    if files is None:
        return f"{directory} is there, and was not written by layerskip; move it away"
    for name, digest in files.items():
        path = directory / name
        if digest is not None and path.exists() and _digest(path) != digest:
            return f"{path} was changed after layerskip wrote it; move it away"
    return None


def written(directory: Path) -> dict[str, str | None] | None:
    """What the manifest of ``directory`` lists, names to digests, or None where there is no manifest."""
    if directory.is_symlink() or not (directory / MANIFEST).is_file():
        return None
    files: dict[str, str | None] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    return files


def remove_written(directory: Path) -> None:
    """Remove a directory that `publish` made. Where others put files into it, these stay, without the manifest."""
    for leftover in directory.parent.glob(".*.removed"):  # of a removal that was cut short
        _delete(leftover, written(leftover) or ())
    files = written(directory)
    if files is None:
        raise ValueError(f"{directory} has no {MANIFEST}, so it is not layerskip's to remove")
    if set(_files(directory)) <= files.keys():
        aside = directory.with_name(f".{directory.name}.removed")
        directory.rename(aside)  # at once, so that nobody takes what is left of it for a whole one
        _delete(aside, files)
    else:
        (directory / MANIFEST).unlink()
        _delete(directory, files)


def _files(directory: Path) -> list[str]:
    """The names of all files and links below, relative, without the manifest."""
    below = (Path(folder) / name for folder, folders, names in os.walk(directory) for name in (*folders, *names))
    found = (path for path in below if path.is_symlink() or not path.is_dir())
    return sorted(str(path.relative_to(directory)) for path in found if path != directory / MANIFEST)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """What is in a file or a directory reaches the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prepare(scratch: Path, target: Path, checked: bool = True) -> None:
    """Give a directory its manifest and what others put into ``target``; all of it reaches the disk."""
    reason = obstacle(target)
    if reason is not None:
        raise FileExistsError(f"{reason}; what was to be there is in {scratch}")
    files = {name: _digest(scratch / name) if checked else None for name in _files(scratch)}
    if target.exists():
        _carry_over(target, scratch, files)
    (scratch / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    for name in (*files, MANIFEST):
        _sync(scratch / name)
    for folder, _, _ in os.walk(scratch):
        _sync(Path(folder))


def _put(scratch: Path, target: Path) -> None:
    """Put a directory in its place; what was there takes the other's."""
    if target.exists():
        _exchange(scratch, target)
    else:
        scratch.rename(target)
    _sync(target.parent)


def _carry_over(target: Path, scratch: Path, files: Iterable[str]) -> None:
    """Link the files that others put into ``target`` into ``scratch``, which is to replace it."""
    foreign = set(_files(target)) - (written(target) or {}).keys()
    for name in sorted(foreign):
        if name in files:
            raise FileExistsError(f"{target / name} was not written by layerskip, and is in the way; move it away")
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(target / name, scratch / name, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(target / name, scratch / name, follow_symlinks=False)


def _exchange(one: Path, two: Path) -> None:
    """Swap two directories: by one system call or, where the file system has none, by three renames; see `_recover`."""
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


def _recover(target: Path, scratch: Path) -> None:
    """After a kill amid the three renames of `_exchange`: finish them, or take them back."""
    aside = _aside(scratch)
    if aside.exists():
        aside.rename(scratch if target.exists() else target)


def _discard(scratch: Path, target: Path) -> None:
    """Remove what was replaced by ``target``, or was not finished; a file of others must be in ``target``, too."""
    if not scratch.exists():
        return
    files = written(scratch)
    if files is None:  # never published: all of it is layerskip's, or a link
        shutil.rmtree(scratch)
        return
    foreign = set(_files(scratch)) - files.keys()
    for name in foreign:
        if not (target / name).exists():  # it came in the moment in which the directories were exchanged
            raise FileExistsError(f"{scratch / name} was not written by layerskip; move it away")
    _delete(scratch, (*foreign, *files))


def _delete(directory: Path, names: Iterable[str]) -> None:
    """Delete files, the manifest as the last, then the directories that are left empty."""
    for name in (*names, MANIFEST):
        (directory / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(directory, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys whose values differ, with both values; empty where none does."""
    keys = [key for key in dict.fromkeys((*now, *before)) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)


class Journal:
    """A file with one record a line, each on the disk before the next is made; the first line says what they are of.

    Parameters
    ----------
    path : Path
        Where there is a journal of the same work, it is gone on with; a last line that was cut short is dropped.
    work : mapping
        What the records depend on, as JSON takes it.
    overwrite : bool
        Whether a journal of other work is replaced; one without records always is.

    Raises
    ------
    ValueError
        For a journal of other work (with the differences), or a file that is none.
    BlockingIOError
        While another process writes it.
    """

    def __init__(self, path: Path, work: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        if not path.exists():
            self._create(work)
        before = self._read()
        changed = differences(before, work)
        if not changed:
            return
        self._file.close()
        if self.records and not overwrite:
            raise ValueError(f"{path} is what is there of other work: {changed}; --overwrite begins anew")
        self._create(work)
        self._read()

    def _create(self, work: Mapping[str, Any]) -> None:
        write_atomically(self.path, _line(work))

    def _read(self) -> dict[str, Any]:
        """Read and open for more; what the work was."""
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
        """Write a record; it stays, whatever happens next."""
        self._file.write(_line(record))
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        """Let another process write; a journal without records goes."""
        self._file.close()
        if not self.records:
            self.path.unlink()

    def remove(self) -> None:
        """Delete the file: what was made of its records is written."""
        self._file.close()
        self.path.unlink()


def _line(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
