"""What drafts, and how many tokens: from the options of the command line, else from the model's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

CONFIG_KEY = "layerskip"
"""The entry of config.json with the model's own ``exit_layer`` and ``num_speculations``."""
DEFAULT_SPECULATIONS = 4


@dataclass(frozen=True)
class Settings:
    """How a model drafts for itself.

    Parameters
    ----------
    exit_layer : int
        E, how many of the model's layers draft.
    num_speculations : int
        K, the tokens drafted a round.
    draft_head : str
        What scores the drafts: ``full``, the model's own head, read by our kernel; ``int8``, a copy of it in int8;
        ``vllm``, the model's own head as vLLM computes it; or the file or directory of a saved draft head.
    mend_cpu_sampling : bool
        Replace the function in which vLLM loses the temperatures of speculative rows on CPUs.
    """

    exit_layer: int
    num_speculations: int
    draft_head: str
    mend_cpu_sampling: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any], config: Any, model: str) -> Settings:
        """What ``options`` say, else the model's configuration, else a quarter of the layers and 4 tokens.

        Parameters
        ----------
        options : mapping
            Of ``--model-loader-extra-config``; names that are not fields of this class are vLLM's own.
        config : transformers.PretrainedConfig
        model : str
            A directory or a name on the Hugging Face hub. A draft head that lies in the directory is taken, and what
            ``layerskip tune`` has written there, unless it is about an exit with blocks, which vLLM can't run.

        Raises
        ------
        ValueError
            If a value does not fit the model.
        """
        from ..decoding.draft_head import FILE_NAME  # not before it is needed: see the package's docstring

        own = getattr(config, CONFIG_KEY, None) or {}
        if not isinstance(own, Mapping):
            raise ValueError(f"{CONFIG_KEY!r} in the config.json of {model} must be an object, got {own!r}")
        beside = Path(model) / FILE_NAME
        values: dict[str, Any] = {
            "exit_layer": max(1, config.num_hidden_layers // 4),
            "num_speculations": DEFAULT_SPECULATIONS,
            "draft_head": str(beside) if beside.is_file() else "full",
            **{name: own[name] for name in ("exit_layer", "num_speculations") if name in own},
            **_tuned(Path(model)),
            **split(options)[0],
        }
        settings = cls(**values)
        settings._check(config.num_hidden_layers)
        return settings

    def _check(self, layers: int) -> None:
        if not _is_int(self.exit_layer) or not 0 < self.exit_layer < layers:
            raise ValueError(f"exit_layer must be in 1 … {layers - 1}, below the model's last, got {self.exit_layer!r}")
        if not _is_int(self.num_speculations) or self.num_speculations < 1:
            raise ValueError(f"num_speculations must be at least 1, got {self.num_speculations!r}")
        if not isinstance(self.mend_cpu_sampling, bool):
            raise ValueError(f"mend_cpu_sampling must be true or false, got {self.mend_cpu_sampling!r}")
        known = self.draft_head in ("full", "int8", "vllm")
        if not known and not (isinstance(self.draft_head, str) and Path(self.draft_head).exists()):
            raise ValueError(
                f"draft_head must be full, int8, vllm, or the path of a saved draft head, got {self.draft_head!r}"
            )


def _tuned(folder: Path) -> dict[str, Any]:
    """What ``layerskip tune`` found best, as far as vLLM can do the same."""
    from ..decoding.tuning import FILE_NAME, Tuning

    if not (folder / FILE_NAME).is_file():
        return {}
    tuning = Tuning.load(folder)
    if tuning.exit is not None:
        return {}
    counts = {"exit_layer": tuning.exit_layer, "num_speculations": tuning.num_speculations}
    values = {name: value for name, value in counts.items() if value != "auto"}
    return values if tuning.draft_head is None else {**values, "draft_head": tuning.draft_head}


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours, and those of vLLM's own loader, which refuses names that it does not know."""
    names = {field.name for field in fields(Settings)}
    ours = {name: value for name, value in options.items() if name in names}
    return ours, {name: value for name, value in options.items() if name not in names}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
