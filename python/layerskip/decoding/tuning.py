"""Decoder options that ``layerskip tune`` measured, stored in a file beside the model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import registry
from .._files import write_atomically
from ..models.files import Field, Fields, check_fields
from . import draft_model

FILE_NAME = "layerskip.json"
CONFIG_KEY = "layerskip"
"""Key of the same options in the config.json that ``layerskip export`` writes."""
_MEASURED = "measured"
_FIELDS: Fields = {
    "exit_layer": Field(int, 1, 10_000), "num_speculations": Field(int, 1, 10_000), "draft_head": Field(str),
    "draft_source": Field(str), "exit": Field(str),
}  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """Options of `SelfSpeculativeDecoder` that depend on the model, the machine and the prompts.

    Parameters
    ----------
    exit_layer, num_speculations : int or "auto"
    draft_head : str, optional
        "full", "int8", or the path of a `DraftHead`.
    draft_source : str
        "exit", "ngram" or "auto".
    exit : str, optional
        Path of an `Exit`.
    """

    exit_layer: int | str = "auto"
    num_speculations: int | str = "auto"
    draft_head: str | None = None
    draft_source: str = "exit"
    exit: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the decoder; a draft head is loaded."""
        if self.draft_head in (None, "full", "int8"):
            return dataclasses.asdict(self)
        return {**dataclasses.asdict(self), "draft_head": draft_model.DraftHead.load(Path(self.draft_head))}

    def save(self, path: Path, measured: Mapping[str, Any]) -> None:
        """Write the file atomically; ``measured`` is stored for the reader and not loaded again."""
        content = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        for name in ("draft_head", "exit"):
            if name in content:
                content[name] = _relative(content[name], path.parent)
        write_atomically(path, json.dumps({**content, _MEASURED: measured}, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Tuning:
        """Read a file of `save`; paths in it are relative to its folder.

        Raises
        ------
        FileNotFoundError, ValueError
            If it does not exist or is malformed.
        """
        path = Path(path).expanduser()
        path = path / FILE_NAME if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no {FILE_NAME} at {path}; layerskip tune writes one") from None
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        return cls._of(content, str(path), path.parent)

    @classmethod
    def beside(cls, name_or_dir: str | Path, config: Any) -> Tuning | None:
        """Read the options from the model's directory, else from its config; None without either."""
        folder = Path(name_or_dir).expanduser()
        if (folder / FILE_NAME).is_file():
            return cls.load(folder)
        entry = getattr(config, CONFIG_KEY, None)
        if entry is None:
            return None
        head = folder / draft_model.FILE_NAME
        heads = {"draft_head": str(head)} if head.is_file() else {}
        where = f"{CONFIG_KEY!r} in the config.json of {folder}"
        return cls._of({**heads, **_mapping(entry, where)}, where, folder)

    @classmethod
    def _of(cls, content: Any, where: str, folder: Path) -> Tuning:
        given = {name: value for name, value in _mapping(content, where).items() if name != _MEASURED}
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"{where} has {name!r}, expected only {', '.join(known)}")
        check_fields(where, {name: value for name, value in given.items() if value != "auto"}, _FIELDS)
        for name in ("draft_head", "exit"):
            if isinstance(given.get(name), str) and (folder / given[name]).exists():
                given[name] = str(folder / given[name])
        return cls(**given)


def tuned(
    name_or_dir: str | Path, config: Any, tuning: str | Path | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Complete the given decoder options by those of ``tuning``.

    Without ``tuning``, take the options beside the model, unless an exit or an exit layer is given; without either, the
    exit that the model comes with.
    """
    known = None
    chosen = any(options.get(name) is not None for name in ("exit_layer", "exit"))
    if tuning is not None:
        known = Tuning.load(tuning)
    elif not chosen:
        known = Tuning.beside(name_or_dir, config)
    if known is not None:
        return {**known.options, **options}
    if not chosen and options.get("exit_choices") is None and registry.shipped_exit(str(name_or_dir)) is not None:
        return {"exit": str(name_or_dir), **options}
    return dict(options)


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be an object, got {content!r}")
    return content


def _relative(value: str, folder: Path) -> str:
    """Return a path below ``folder`` relative to it, any other path absolute, a name unchanged."""
    path = Path(value).expanduser()
    if not path.exists():
        return value
    absolute = path.resolve()
    below = absolute.is_relative_to(folder.resolve())
    return os.path.relpath(absolute, folder.resolve()) if below else str(absolute)
