"""A training run as a YAML file: every key, its default, and what is wrong with a file that has another."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .dropout import SCALES, LayerDropout, layer_dropout_rates
from .exits import (
    CURRICULA,
    WEIGHTS,
    AllExits,
    Curriculum,
    GradualCurriculum,
    RandomExits,
    RotationalCurriculum,
    early_exit_weights,
)

METHODS = ("full", "lora")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("bf16", "fp32")


@dataclass
class DropoutRecipe:
    """Layer dropout: the largest rate, how it grows with depth, how it grows with time."""

    max: float = 0.0
    kind: str | list[float] = "exponential"
    scale: str = "constant"


@dataclass
class Recipe:
    """What `layerskip train` reads.

    ``steps`` counts optimizer steps and wins over ``epochs``. ``tasks`` are names that `layerskip.training.data` knows,
    or paths of JSON-lines files with ``prompt`` and ``completion``. ``exit_layers`` are the candidates (default: all);
    ``exits_per_step`` is for the random curriculum, ``rotate_every`` for the rotational one.
    """

    model: str = "smollm2"
    tasks: list[str] = field(default_factory=lambda: ["parsing"])
    method: str = "lora"
    lora_rank: int = 32
    freeze_embedding: bool = True
    precision: str = "bf16"
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 24
    gradient_accumulation: int = 1
    max_length: int = 1024
    steps: int | None = None
    epochs: float = 1.0
    exit_layers: list[int] | None = None
    curriculum: str = "random"
    exits_per_step: int = 2
    rotate_every: int = 1
    exit_weights: str = "paper"
    exit_weight_scale: float = 1.0
    layer_dropout: DropoutRecipe = field(default_factory=DropoutRecipe)
    eval_split: str | None = None
    eval_examples: int = 120
    log_every: int = 10
    save_every: int = 200
    seed: int = 0
    output: str = "layerskip-out"

    def __post_init__(self) -> None:
        choices = {
            "method": METHODS, "schedule": SCHEDULES, "precision": PRECISIONS, "curriculum": CURRICULA,
            "exit_weights": WEIGHTS,
        }  # fmt: skip
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected one of {', '.join(known)}")
        if self.layer_dropout.scale not in SCALES:
            raise ValueError(f"layer_dropout.scale is {self.layer_dropout.scale!r}, expected {' or '.join(SCALES)}")
        positive = (
            "lora_rank", "learning_rate", "batch_size", "gradient_accumulation", "max_length", "epochs",
            "rotate_every", "log_every", "save_every", "eval_examples",
        )  # fmt: skip
        for key in positive:
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be above 0, got {getattr(self, key)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.tasks:
            raise ValueError("tasks is empty, nothing to train on")

    def make_curriculum(self, num_layers: int, total_steps: int) -> Curriculum:
        """The curriculum for a model of ``num_layers``."""
        if self.curriculum == "rotational":
            return RotationalCurriculum(num_layers, self.rotate_every, self.exit_layers)
        if self.curriculum == "gradual":
            return GradualCurriculum(num_layers, total_steps, self.exit_layers)
        if self.curriculum == "random":
            return RandomExits(num_layers, self.exit_layers, self.exits_per_step, self.seed)
        return AllExits(num_layers, self.exit_layers)

    def make_dropout(self, num_layers: int, total_steps: int) -> LayerDropout | None:
        """The layer dropout, or None where no layer is ever dropped."""
        rates = layer_dropout_rates(num_layers, self.layer_dropout.max, self.layer_dropout.kind)
        if not any(rates):
            return None
        return LayerDropout(rates, self.seed, total_steps, self.layer_dropout.scale)

    def check_exits(self, num_layers: int) -> None:
        """Raise ValueError where the exits do not fit a model of ``num_layers``."""
        curriculum = self.make_curriculum(num_layers, 1)
        early_exit_weights(curriculum.enabled(0), num_layers, self.exit_weights, self.exit_weight_scale)


def _construct(kind: type, values: Any, where: str) -> Any:
    """Make ``kind`` of a mapping; an unknown key is named together with the nearest known one."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping of keys to values, got {values!r}")
    known = {entry.name: entry for entry in fields(kind)}
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise ValueError(f"{where}: unknown key {key!r}, did you mean {nearest!r}?")
    checked = {key: _typed(value, str(known[key].type), f"{where}: {key}") for key, value in values.items()}
    return kind(**checked)


def _typed(value: Any, kind: str, where: str) -> Any:
    """A YAML value as the field's annotation, a string, wants it."""
    if kind == "DropoutRecipe":
        return _construct(DropoutRecipe, value, where)
    accepted: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    for option in kind.split(" | "):
        if option.startswith("list["):
            inner = accepted[option[5:-1]]
            if isinstance(value, list) and all(
                isinstance(item, inner) and not isinstance(item, bool) for item in value
            ):
                return value
        elif isinstance(value, accepted[option]) and (option == "bool" or not isinstance(value, bool)):
            return float(value) if option == "float" else value
    raise ValueError(f"{where} is {value!r}, expected {kind.replace('None', 'nothing')}")


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe; ``overrides`` win over what the file says.

    Raises
    ------
    ValueError
        For a key that does not exist (with the nearest that does), a value of the wrong type or out of range.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {values!r}")
    return make_recipe({**values, **(overrides or {})}, str(path))


def make_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe of keys and values; see `read_recipe`."""
    recipe: Recipe = _construct(Recipe, values, where)
    return recipe
