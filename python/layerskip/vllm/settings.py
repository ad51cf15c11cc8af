"""Exit, head and number of draft tokens: from the command line's options, else from the model's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

LOAD_FORMAT = "layerskip"
DEFAULT_SPECULATIONS = 4


@dataclass(frozen=True)
class Settings:
    """How a model drafts for itself."""

    exit_layer: int  # E, the number of layers that draft
    num_speculations: int  # K, the number of draft tokens a round
    # ``full``: the model's own head, read by our kernel; ``int8``: a copy in int8; ``vllm``: the model's own as vLLM
    # computes it; ``exit``: the exit's tokens in int8, or all; or the path of a saved draft head.
    draft_head: str
    mend_cpu_sampling: bool = False  # replace the function in which vLLM loses temperatures of draft rows on CPUs
    exit: str | None = None  # path of an `Exit`, or the name of a model that comes with one

    @classmethod
    def of(cls, options: Mapping[str, Any], config: Any, model: str) -> Settings:
        """Combine ``options``, else the model's files, else a quarter of the layers and 4 tokens.

        Parameters
        ----------
        options : mapping
            Of ``--model-loader-extra-config``; names that are not fields of this class are vLLM's own.
        config : transformers.PretrainedConfig
        model : str
            A directory, whose draft head and layerskip.json are used, or a name on the Hugging Face hub.

        Raises
        ------
        ValueError, FileNotFoundError
            If a value does not fit the model, or a file does not exist.
        """
        from ..decoding.draft_model import FILE_NAME  # not before it is needed: see the package's docstring

        values = {**_known(options, config, model), **split(options)[0]}
        if values.get("exit") is None:
            beside = Path(model) / FILE_NAME
            head = str(beside) if beside.is_file() else "full"
            defaults = {"exit_layer": max(1, config.num_hidden_layers // 4), "draft_head": head}
        else:
            defaults = {"exit_layer": _layer_of(values["exit"], config), "draft_head": "exit"}
        settings = cls(**{"num_speculations": DEFAULT_SPECULATIONS, **defaults, **values})
        settings._check(config.num_hidden_layers)
        layer = defaults["exit_layer"]
        if settings.exit is not None and settings.exit_layer != layer:
            raise ValueError(f"the exit {settings.exit} follows layer {layer}, but exit_layer is {settings.exit_layer}")
        return settings

    def _check(self, layers: int) -> None:
        if not _is_int(self.exit_layer) or not 0 < self.exit_layer < layers:
            raise ValueError(f"exit_layer must be in 1 … {layers - 1}, below the model's last, got {self.exit_layer!r}")
        if not _is_int(self.num_speculations) or self.num_speculations < 1:
            raise ValueError(f"num_speculations must be at least 1, got {self.num_speculations!r}")
        if not isinstance(self.mend_cpu_sampling, bool):
            raise ValueError(f"mend_cpu_sampling must be true or false, got {self.mend_cpu_sampling!r}")
        known = self.draft_head in ("full", "int8", "vllm", *(["exit"] if self.exit else []))
        if not known and not (isinstance(self.draft_head, str) and Path(self.draft_head).exists()):
            raise ValueError(
                f"draft_head must be full, int8, vllm, exit (with an exit), or the path of a saved draft head, got "
                f"{self.draft_head!r}"
            )


def _known(options: Mapping[str, Any], config: Any, model: str) -> dict[str, Any]:
    """The settings in the model's files (of ``layerskip tune``, else config.json), unless ``options`` have an exit."""
    from ..decoding.tuning import Tuning

    tuning = None if "exit" in options else Tuning.beside(model, config)
    if tuning is None:
        return {}
    names = ["num_speculations", "draft_head"] + ([] if "exit_layer" in options else ["exit", "exit_layer"])
    values = {name: getattr(tuning, name) for name in names}
    return {name: value for name, value in values.items() if value not in (None, "auto")}


def _layer_of(source: Any, config: Any) -> int:
    """The layer of an exit; ValueError if it is for another model."""
    from ..models import Exit

    if not isinstance(source, str):
        raise ValueError(f"exit must be a path, or the name of a model that comes with one, got {source!r}")
    exit = Exit.load(source)
    exit.check_sizes(config.num_hidden_layers, config.vocab_size, config.hidden_size)
    return exit.exit_layer


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into ours and those of vLLM's own loader, which refuses unknown names."""
    names = {field.name for field in fields(Settings)}
    ours = {name: value for name, value in options.items() if name in names}
    return ours, {name: value for name, value in options.items() if name not in names}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
