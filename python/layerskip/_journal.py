"""Records that outlive whatever stops their writer, so that the same work, started again, goes on behind them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._files import write_atomically


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
