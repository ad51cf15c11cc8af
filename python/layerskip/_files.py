"""Write files and directories atomically, and never remove what another program wrote."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
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
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def check_output(
    output: Path, overwrite: bool, inputs: Iterable[str | Path | None] = (), directory: bool = False
) -> None:
    """Raise OSError if a command must not write the file or ``directory`` ``output``. Call before the work.

    It exists and ``overwrite`` is not set, `obstacle` has a reason against replacing the directory, it is one of the
    ``inputs`` or holds one (links are followed), or its folder is not writable.
    """
    for given in (one for one in inputs if one):
        path = Path(given).expanduser()
        if path.exists() and path.resolve().is_relative_to(output.resolve()):
            raise FileExistsError(f"{output} is or holds the input {given}; give another output")
    if directory and (reason := obstacle(output)):
        raise FileExistsError(reason)
    if output.is_dir() and not directory:
        raise IsADirectoryError(f"{output} is a directory, expected the name of a file to write")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; give another name, or --overwrite to replace it")
    check_folder(output.parent)


@contextmanager
def reserved(output: Path, *args: Any, **kwargs: Any) -> Iterator[None]:
    """`check_output`, and let no other process write ``output`` until the end."""
    with lock(output):
        check_output(output, *args, **kwargs)
        yield


def check_folder(folder: Path) -> None:
    """Raise OSError if no files can be written into ``folder``, which need not exist yet."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, so nothing can be written into {folder}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} is not writable, so nothing can be written into {folder}")


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Let no other process hold the lock of ``path``, a file beside it with this process's id. Make the folder.

    BlockingIOError if another process holds it. The system frees the lock of a dead process, whose file is reused.
    """
    path = path.absolute()
    check_folder(path.parent)
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(handle, 20).decode(errors="replace")
            os.close(handle)
            raise BlockingIOError(f"another process is writing {path} (process id {owner or 'unknown'})") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            warnings.warn(f"{file.parent} has no locks: let no other process write {path} ({error})", stacklevel=4)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                break
        os.close(handle)  # its owner has just deleted it
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):  # some work was left there
            for folder in made:
                folder.rmdir()


@contextmanager
def replaced(*targets: Path) -> Iterator[list[Path]]:
    """Yield new directories to fill; `publish` all of them as ``targets`` at the end, or delete them after an error."""
    pairs = [(target.with_name(f".{target.name}.unfinished"), target) for target in targets]
    for scratch, target in pairs:
        if (aside := _aside(scratch)).exists():  # a kill between the three renames of `_exchange`
            aside.rename(scratch if target.exists() else target)
        _discard(scratch, target)
        scratch.mkdir(parents=True)
    try:
        yield [scratch for scratch, _ in pairs]
    except BaseException:
        for scratch, _ in pairs:
            shutil.rmtree(scratch)
        raise
    publish(*pairs)


def publish(*pairs: tuple[Path, Path], hashed: bool = True) -> None:
    """Replace the second directory of each pair by the first, on the same file system. A kill leaves old or new.

    Files that others put into the old one are kept. The manifest has digests of the new files, so that files changed
    later count as foreign; without ``hashed``, which reads all files once, sizes and times of change.

    Raises
    ------
    FileExistsError
        If `obstacle` has a reason, or foreign files have names of new ones; all directories stay.
    """
    for scratch, target in pairs:
        _prepare(scratch, target, hashed)
    for scratch, target in pairs:  # all within a moment
        if target.exists():
            _exchange(scratch, target)
        else:
            scratch.rename(target)
        _sync(target.parent)
    for scratch, target in pairs:
        _discard(scratch, target)


def obstacle(directory: Path) -> str | None:
    """Why `publish` would not replace ``directory``: it was not published, or was changed since; None if it would."""
    if not os.path.lexists(directory):
        return None
    manifest = _manifest(directory)
    if manifest is None:
        return f"{directory} exists, and was not written by layerskip; move it away"
    changed = next(iter((manifest.keys() & _files(directory)) - _unchanged(directory)), None)
    if changed is None:
        return None
    reason = f"has no digest in {MANIFEST}" if manifest[changed] is None else "was changed after layerskip wrote it"
    return f"{directory / changed} {reason}; move it away"


def remove_written(directory: Path) -> None:
    """Remove the files that `publish` wrote and nobody changed since; others stay, without a manifest."""
    for leftover in directory.parent.glob(re.sub(r"\d+", "*", f".{directory.name}.removed")):  # a kill while deleting
        _delete(leftover, _unchanged(leftover))
    if _manifest(directory) is None:
        raise ValueError(f"{directory} has no {MANIFEST}, so it is not layerskip's to remove")
    files, own = _files(directory), _unchanged(directory)
    if files == own:  # a partly deleted directory must not look complete
        directory = directory.rename(directory.with_name(f".{directory.name}.removed"))
    elif own:
        (directory / MANIFEST).unlink()
    else:
        warnings.warn(f"{directory} stays: no file in it is as its {MANIFEST} has it", stacklevel=2)
    _delete(directory, own)


def digest_of(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def _manifest(directory: Path) -> dict[str, str | None] | None:
    """Names of files to digests; None without a manifest, ValueError if it is broken or names files elsewhere."""
    path = directory / MANIFEST
    if directory.is_symlink() or not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} must map names to digests, got {manifest!r}")
    for name, digest in manifest.items():
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"{path} names {name!r}, which is not a file of this directory")
        if not isinstance(digest, (str, type(None))):
            raise ValueError(f"{path}: the digest of {name!r} is {digest!r}, expected a text")
    return manifest


def _unchanged(directory: Path) -> set[str]:
    """The files of ``directory`` that are as the manifest has them. A file without a digest is not."""
    manifest = _manifest(directory) or {}
    names = [name for name in _files(directory) if manifest.get(name) is not None]
    with ThreadPoolExecutor() as pool:
        marks = pool.map(lambda name: _mark(directory / name, not str(manifest[name]).startswith("stat ")), names)
    return {name for name, mark in zip(names, marks, strict=True) if mark == manifest[name]}


def _mark(path: Path, hashed: bool) -> str:
    status = path.lstat()
    if not path.is_file() or path.is_symlink():
        return "no file"
    return digest_of(path) if hashed else f"stat {status.st_size} {status.st_mtime_ns}"


def _files(directory: Path) -> set[str]:
    """Relative names of all files and links below, except the manifest. Links are not followed."""
    below = (Path(folder) / name for folder, folders, names in os.walk(directory) for name in (*folders, *names))
    found = (path for path in below if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(directory)) for path in found if path != directory / MANIFEST}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prepare(scratch: Path, target: Path, hashed: bool) -> None:
    """Link the foreign files of ``target`` into ``scratch``, write its manifest, and sync all of it."""
    if reason := obstacle(target):
        raise FileExistsError(f"{reason}; the new files are in {scratch}")
    files = sorted(_files(scratch))
    with ThreadPoolExecutor() as pool:
        manifest = dict(zip(files, pool.map(lambda name: _mark(scratch / name, hashed), files), strict=True))
    for name in sorted(_files(target) - (_manifest(target) or {}).keys()):
        if name in manifest:
            raise FileExistsError(f"{target / name} was not written by layerskip, and is in the way; move it away")
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(target / name, scratch / name, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(target / name, scratch / name, follow_symlinks=False)
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (*files, MANIFEST):
        _sync(scratch / name)
    for folder, _, _ in os.walk(scratch):
        _sync(Path(folder))


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
    manifest = _manifest(scratch)
    for name in () if manifest is None else _files(scratch) - manifest.keys():
        if not os.path.lexists(target / name):  # created during the exchange
            raise FileExistsError(f"{scratch / name} was not written by layerskip; move it away")
    if scratch.exists():
        shutil.rmtree(scratch)


def _delete(directory: Path, names: Iterable[str]) -> None:
    """Delete files, the manifest last, then empty directories."""
    for name in names:
        (directory / name).unlink()
    if not _files(directory):
        (directory / MANIFEST).unlink(missing_ok=True)
    for folder, _, _ in os.walk(directory, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], added: Iterable[str] = ()) -> str:
    """The keys whose values differ, with both values; empty if none does.

    ``before`` may lack the keys ``added``, which older versions did not record; a warning says so.
    """
    if unknown := [key for key in added if key in now and key not in before]:
        missing = ", ".join(unknown)
        warnings.warn(
            f"an older version did not record the {missing}; begin anew if it has changed since", stacklevel=2
        )
    keys = [key for key in dict.fromkeys((*now, *before)) if before.get(key) != now.get(key)]
    return "; ".join(
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys if key in before or key not in added
    )


class Journal:
    """A file with one JSON record a line, each synced before the next; the first line is the ``work``.

    An existing journal of the same work is continued; journals of older versions may lack the keys ``added``. Lines
    that cannot be read are skipped with a warning; ``torn`` says whether there was one between others.

    Raises
    ------
    ValueError
        For a file that is no journal, or of other work (with the differences) unless ``overwrite`` or without records.
    BlockingIOError
        If another process is writing it.
    """

    def __init__(self, path: Path, work: Mapping[str, Any], overwrite: bool = False, added: Iterable[str] = ()) -> None:
        self.path, self.torn = path, False
        self.records: list[Any] = []
        with ExitStack() as held:
            held.enter_context(lock(path))
            size, changed = 0, "new"
            if path.exists():
                size, before = self._read()
                changed = differences(before, work, added)
            if changed:
                if self.records and not overwrite:
                    raise ValueError(f"{path} holds records of other work: {changed}; --overwrite to begin anew")
                write_atomically(path, _line(work))
                size, self.records, self.torn = len(_line(work)), [], False
            self._file = held.enter_context(path.open("ab", buffering=0))
            self._file.truncate(size)
            self._held = held.pop_all()

    def _read(self) -> tuple[int, dict[str, Any]]:
        """Read the records; return the length of the whole lines, and the work."""
        data = self.path.read_bytes()
        first, *lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True) or [b""]
        try:
            work = json.loads(first)
        except ValueError as error:
            raise ValueError(f"{self.path} is no journal of records: {error}") from error
        if not isinstance(work, dict):
            raise ValueError(f"{self.path} is no journal of records: it begins with {work!r}")
        skipped = []
        for number, line in enumerate(lines, start=2):
            try:
                self.records.append(json.loads(line))
            except ValueError:
                skipped.append(str(number))
        self.torn = bool(skipped)
        size = len(first) + sum(map(len, lines))
        if size < len(data):
            skipped.append(str(len(lines) + 2))
        if skipped:
            warnings.warn(f"{self.path}: skipped line {', '.join(skipped)}, which was cut off", stacklevel=4)
        return size, work

    def append(self, record: Any) -> None:
        """Write a record and sync it; after an error nothing of it is in the file."""
        size, line = os.fstat(self._file.fileno()).st_size, memoryview(_line(record))
        try:
            while line:  # a write may take less than all of it
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(size)
            raise
        self.records.append(record)

    def close(self) -> None:
        """Let another process write; delete the file if it has no records."""
        if not self.records:
            self.path.unlink(missing_ok=True)
        self._held.close()

    def remove(self) -> None:
        """Delete the file, after the result of its records is written."""
        self.path.unlink(missing_ok=True)
        self._held.close()


def _line(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
