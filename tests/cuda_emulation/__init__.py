"""Runs the CUDA kernels of ``csrc/cuda`` on the CPU; README.md in this folder says how."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .build import FOLDER, ROOT, build

__all__ = ["EmulationError", "Library", "Traffic", "library", "planted", "unavailable"]

# A buffer of so many bytes is memory in name only: all but its last MiB is not copied, and reads as 0. So a test can
# have indices that 32 bits do not hold.
VAST = 1 << 30
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class EmulationError(RuntimeError):
    """A kernel or its launcher did something that it must not do."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one kernel moved between one buffer and the chip.

    ``requested`` by all threads; ``by_block``, each 32-byte sector counted once a block, is what L2 must deliver;
    ``distinct``, each sector once a launch, is what memory must deliver; ``written`` by all threads.
    """

    kernel: str
    launches: int
    buffer: str
    requested: int
    by_block: int
    distinct: int
    written: int


def unavailable() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    return None if shutil.which("g++") else "no g++ to compile the emulated kernels with"


@cache
def library(name: str) -> Library:
    """The entries of ``ops/<name>.cpp``, compiled when needed."""
    return Library(name)


Change = tuple[str, str]  # an old text and the new one


def planted(
    name: str, variant: str, header: Path, *changes: Change, more: Mapping[str, Change] = MappingProxyType({})
) -> Library:
    """The library compiled from copies of headers in which some text was replaced: to see a mistake being caught.

    Parameters
    ----------
    name : str
        Of the file in ``ops``.
    variant : str
        Distinguishes this copy from others.
    header : Path
        Under ``csrc`` or ``tests``, as ``cuda/exit_head.cu`` is.
    *changes : (old, new)
        Each old text must be there.
    more : mapping of str to (old, new)
        A change of another header beside it, by its name.
    """
    overlay = FOLDER / f"{name}-{variant}"
    _replace(header, overlay, changes)
    for other, change in more.items():
        _replace(header.parent / other, overlay, [change])
    return Library(name, f"-{variant}", overlay)


def _replace(header: Path, overlay: Path, changes: Sequence[Change]) -> None:
    """Write a changed copy of a header into ``overlay``, unless it is there."""
    text = header.read_text()
    for old, new in changes:
        if old not in text:
            raise ValueError(f"{header} has no {old!r}")
        text = text.replace(old, new)
    root = next(root for root in (ROOT / "csrc", ROOT / "tests") if header.is_relative_to(root))
    copy = overlay / header.relative_to(root)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if not copy.exists() or copy.read_text() != text:
        copy.write_text(text)


class _Arguments:
    """Copies of the tensors in device memory, and the values that C takes."""

    def __init__(self, lib: ctypes.CDLL, writes: Sequence[Tensor]) -> None:
        self.lib = lib
        self.writes = {tensor.untyped_storage().data_ptr() for tensor in writes}
        self.copies: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def value(self, name: str, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return ctypes.c_void_p(self._address(name, arg))
        if isinstance(arg, (list, tuple)):
            addresses = [self._address(f"{name}[{i}]", one) if one is not None else None for i, one in enumerate(arg)]
            return (ctypes.c_void_p * len(addresses))(*addresses)
        if arg is None:
            return ctypes.c_void_p(None)
        if isinstance(arg, torch.dtype):
            return ctypes.c_int64(DTYPES[arg])
        return ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int64(int(arg))

    def _address(self, name: str, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.copies:
            label = f"{name} ({str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)})"
            address = self.lib.emu_allocate(label.encode(), storage.nbytes())
            if address is None:
                raise MemoryError(f"no emulated device memory for {label}")
            self._move(address, storage.data_ptr(), storage.nbytes())
            if storage.data_ptr() not in self.writes:
                self.lib.emu_protect(address)
            self.copies[storage.data_ptr()] = (storage, address)
        return int(self.copies[storage.data_ptr()][1] + tensor.storage_offset() * tensor.element_size())

    def copy_back(self) -> None:
        for pointer, (storage, address) in self.copies.items():
            if pointer in self.writes:
                self._move(pointer, address, storage.nbytes())

    @staticmethod
    def _move(to: int, source: int, size: int) -> None:
        """Copy a buffer; of a vast one the last MiB."""
        skipped = size - (1 << 20) if size >= VAST else 0
        ctypes.memmove(to + skipped, source + skipped, size - skipped)


class Library:
    """Entries of one file under ``ops``, compiled for each dtype when an entry is first called with it."""

    def __init__(self, name: str, variant: str = "", overlay: Path | None = None) -> None:
        self._name, self._variant, self._overlay = name, variant, overlay
        self._loaded: dict[int, tuple[Path, ctypes.CDLL]] = {}

    def _use(self, code: int) -> None:
        if code not in self._loaded:
            path = build(self._name, code, self._variant, self._overlay)
            self._loaded[code] = path, ctypes.CDLL(str(path))
        self.path, self.lib = self._loaded[code]
        self.lib.emu_begin.argtypes = (ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int)
        self.lib.emu_allocate.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
        self.lib.emu_allocate.restype = ctypes.c_void_p
        self.lib.emu_protect.argtypes = (ctypes.c_void_p,)
        for name in ("emu_end", "emu_release", "emu_traffic"):
            getattr(self.lib, name).restype = ctypes.c_char_p

    def call(
        self,
        entry: str,
        *args: Any,
        writes: Sequence[Tensor] = (),
        seed: int = 0,
        arch: int = 90,
        count: bool = False,
        last_block: bool = False,
    ) -> list[Traffic]:
        """Run an entry to its end.

        Parameters
        ----------
        entry : str
            The name that ``EMULATED(...)`` gave it.
        *args
            Tensors and lists of tensors become pointers, None a null pointer, int and bool int64_t, float float, a
            torch.dtype its code.
        writes : sequence of Tensor
            The tensors that may be written; writing another one is an error.
        seed : int
            Of the order in which threads and blocks run.
        arch : {80, 90}
            Whether the device has programmatic dependent launch and 227 KB of shared memory, or not.
        count : bool
            Whether to count what is read and written.
        last_block : bool
            Whether to run the last block of each launch alone: of launches that would take hours.

        Returns
        -------
        list of Traffic
            Empty unless ``count``.

        Raises
        ------
        EmulationError
            With the kernel, the block, the thread and the line.
        """
        code = next((DTYPES[arg] for arg in args if isinstance(arg, torch.dtype)), None)
        if code is not None or not self._loaded:  # an entry that takes no dtype is the same in all
            self._use(code or 0)
        function = getattr(self.lib, f"emulated_{entry}")
        with self._running(seed, arch, count, last_block) as arguments:
            arguments.writes |= {tensor.untyped_storage().data_ptr() for tensor in writes}
            status = function(*[arguments.value(f"argument {i}", arg) for i, arg in enumerate(args)])
            message = self.lib.emu_end().decode()
            if message:
                raise EmulationError(self._readable(message))
            if status != 0:
                raise EmulationError(f"{entry} gave CUDA error {status}")
            arguments.copy_back()
            traffic = list(self._traffic()) if count else []
        return traffic

    @property
    def attributes_set(self) -> int:
        """How often an attribute of a kernel was set, as `cudaFuncSetAttribute` does, in all calls."""
        return int(self.lib.emu_attributes_set())

    @contextmanager
    def _running(self, seed: int, arch: int, count: bool, last_block: bool) -> Iterator[_Arguments]:
        self.lib.emu_begin(seed, arch // 10, int(count), int(last_block))
        try:
            yield _Arguments(self.lib, ())
        except BaseException:
            self.lib.emu_end()
            self.lib.emu_release()
            raise
        damaged = self.lib.emu_release().decode()
        if damaged:
            raise EmulationError(f"a kernel wrote past the end of {damaged}")

    def _traffic(self) -> Iterator[Traffic]:
        for line in self.lib.emu_traffic().decode().splitlines():
            kernel, launches, buffer, *numbers = line.split("\t")
            yield Traffic(self._readable(kernel), int(launches), buffer, *map(int, numbers))

    def _readable(self, message: str) -> str:
        """Addresses in the library become names and lines."""

        def replace(match: re.Match[str]) -> str:
            name, line = _resolve(self.path, match[2])
            return name if match[1] == "fn" else line

        return re.sub(r"\{(fn|pc):(0x[0-9a-f]+)\}", replace, message)


@cache
def _resolve(path: Path, address: str) -> tuple[str, str]:
    """Function and line of an address: the innermost line of a kernel's file, through what was inlined."""
    program = shutil.which("addr2line")
    if program is None:
        return address, address
    found = subprocess.run([program, "-Cfie", str(path), address], capture_output=True, text=True, check=True).stdout
    lines = found.splitlines()
    places = [(name, place) for name, place in zip(lines[::2], lines[1::2], strict=True)]
    own = [place for _, place in places if "/cuda_emulation/" not in place and "?" not in place]
    name = places[-1][0].split("(")[0].split("::")[-1].removeprefix("void ")
    return name, (own or [places[0][1]])[0].split(" (")[0]
