"""Training recipes as YAML: keys, defaults, validation. Read without importing torch."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .._imports import need

SHAPES = ("exponential", "linear", "uniform", "step")
"""How a rate of layer dropout grows with depth."""
SCALES = ("constant", "exponential")
"""How it grows with time."""
WEIGHTS = ("paper", "uniform", "linear", "sqrt", "inverse")
"""How much each exit counts."""
CURRICULA = ("all", "random", "rotational", "gradual")
"""Which exits a step trains."""

Number = TypeVar("Number", int, float)

METHODS = ("full", "lora")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
PRECISIONS = ("bf16", "fp32")


@dataclass
class DropoutRecipe:
    """Layer dropout: the largest rate, how it grows with depth, how it grows with time."""

    max: float = 0.0
    kind: str | list[float] = "exponential"
    scale: str = "constant"


@dataclass
class ReplayRecipe:
    """What the full depth is reminded of in every step: tasks as in `Recipe`, and how many tokens of them.

    The loss is on prompts, too.
    """

    tasks: list[str] | dict[str, float] = field(default_factory=list)
    tokens: int = 256


@dataclass
class Recipe:
    """Keys of a recipe for `layerskip train`; `tools.recipe_reference` writes their comments to docs/recipes.md."""

    model: str = "smollm2"  # a directory, a hub name, or a name that a package provides
    # names that a package provides, JSON-lines files or `hub:` datasets; a mapping, `{parsing: 0.9, coding: 0.1}`,
    # gives their shares of the examples
    tasks: list[str] | dict[str, float] = field(default_factory=lambda: ["parsing"])
    method: str = "lora"  # `lora` or `full`
    # one rank, or by layers 0 … L−1, each once: `{0-3: 128, 4-5: 64, 6-29: 12}`; on all seven projections, scaled by
    # 1
    lora_rank: int | dict[str, int] = 32
    # folder of a LoRA adapter to continue from, such as an earlier run's `OUTPUT/adapter`; `lora_rank` then has no
    # effect
    adapter: str | None = None
    # for LoRA: how far the written weights lie from the base model to the trained one (Wortsman et al. 2022, arXiv
    # 2109.01903)
    interpolate: float = 1.0
    freeze_embedding: bool = True  # for `full`: leave embedding and head alone
    precision: str = "bf16"  # `bf16` or `fp32`; trained parameters are fp32 in either
    # its peak; one rate, or by layers as `lora_rank`: `{0-5: 0.0015, 6-29: 0.0007}`
    learning_rate: float | dict[str, float] = 2e-3
    # `cosine`, `linear`, `constant` (no warm-up) or `wsd`: warm-up, stable, linear decay to 0 over the last third
    schedule: str = "cosine"
    warmup: float = 0.03  # share of the steps; from 1 on their number
    beta2: float = 0.999  # AdamW's; lower it where a run has few steps
    weight_decay: float = 0.0  # AdamW's
    max_grad_norm: float = 1.0  # the norm at which gradients are clipped
    batch_size: int = 24  # examples a process
    batch_tokens: int | None = None  # instead of `batch_size`: padded tokens of a batch, of examples of similar length
    gradient_accumulation: int = 1  # batches a step
    max_length: int = 1024  # tokens; longer examples are cut, and left out where nothing of the completion remains
    steps: int | None = None  # optimizer steps; wins over `epochs`
    epochs: float = 1.0  # passes over the examples
    exit_layers: list[int] | None = None  # candidates, in 1 … L; by default all
    curriculum: str = "random"  # `random`, `all`, `rotational` or `gradual`
    exits_per_step: int = 2  # for `random`
    rotate_every: int = 1  # R of `rotational`
    shallow_steps: float = 0.0  # probability, below 1, that a step stops at its deepest early exit
    exit_weights: str = "paper"  # e(l): `paper`, `uniform`, `linear`, `sqrt` or `inverse`
    exit_weight_scale: float = 1.0  # s of e(l)
    # above 0, early exits choose, in the loss, among the labels of the data and this many other tokens, drawn every
    # time
    head_sample: int = 0
    # `{tasks: {text: 0.5, coding: 0.5}, tokens: 256}`: after every batch one of up to `tokens` tokens of other tasks,
    # prompts labelled, too, for the full depth alone; takes `batch_tokens`
    replay: ReplayRecipe = field(default_factory=ReplayRecipe)
    # `{max: 0.1, kind: exponential, scale: constant}`: p_max; the shape over layers (`exponential`, `linear`,
    # `uniform`, `step` or a list); S(t), `constant` or `exponential`
    layer_dropout: DropoutRecipe = field(default_factory=DropoutRecipe)
    eval_split: str | None = None  # a split of the tasks that is evaluated at the end
    eval_examples: int = 120  # how many examples of it
    log_every: int = 10  # steps
    save_every: int = 200  # steps
    seed: int = 0  # of every draw
    output: str = "layerskip-out"  # the directory to write

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
            check_positive(key, getattr(self, key))
        if not 0 < self.beta2 < 1:
            raise ValueError(f"beta2 must be in (0, 1), got {self.beta2}")
        if self.head_sample < 0:
            raise ValueError(f"head_sample must not be negative, got {self.head_sample}")
        if self.adapter is not None and self.method != "lora":
            raise ValueError(f"adapter {self.adapter!r} is a LoRA's, method is {self.method!r}")
        if not 0 < self.interpolate <= 1:
            raise ValueError(f"interpolate must be in (0, 1], got {self.interpolate}")
        if self.interpolate < 1 and self.method != "lora":
            raise ValueError(f"interpolate {self.interpolate} shrinks a LoRA, method is {self.method!r}")
        self._check_batches()
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.tasks:
            raise ValueError("tasks is empty, nothing to train on")
        if isinstance(self.tasks, dict):
            check_positive("tasks", self.tasks)

    def _check_batches(self) -> None:
        if self.batch_tokens is not None:
            check_positive("batch_tokens", self.batch_tokens)
        if not self.replay.tasks:
            return
        if self.batch_tokens is None:
            raise ValueError("replay needs batch_tokens, the size of the batches that it goes between")
        check_positive("replay.tokens", self.replay.tokens)
        if isinstance(self.replay.tasks, dict):
            check_positive("replay.tasks", self.replay.tasks)


def check_positive(key: str, value: Any) -> None:
    """Raise ValueError for a number, or one of a mapping, that is not above 0."""
    for name, number in value.items() if isinstance(value, dict) else [("", value)]:
        if not number > 0:
            raise ValueError(f"{key}{name and f': {name}'} must be above 0, got {number}")


def by_layer(value: Number | Mapping[str, Number], num_layers: int, key: str) -> list[Number]:
    """A LoRA rank or a learning rate for each of ``num_layers`` layers: one for all, or from ranges of layers.

    Ranges are as ``{"0-3": 128, "4": 64, "5-29": 12}``. ValueError, which names ``key``, for a range that is none or
    ends outside 0…L-1, and for a layer in two ranges or in none.
    """
    if not isinstance(value, Mapping):
        return [value] * num_layers
    found: dict[int, Number] = {}
    for layers, number in value.items():
        first, dash, last = layers.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise ValueError(f"{key}: {layers!r} is neither a layer nor a range of layers, such as 0-3")
        if not int(first) <= int(last or first) < num_layers:
            raise ValueError(f"{key}: {layers} is no range within 0-{num_layers - 1}")
        for layer in range(int(first), int(last or first) + 1):
            if layer in found:
                raise ValueError(f"{key}: layer {layer} is named twice")
            found[layer] = number
    for layer in range(num_layers):
        if layer not in found:
            raise ValueError(f"{key}: layer {layer} of 0…{num_layers - 1} has none")
    return [found[layer] for layer in range(num_layers)]


def construct(kind: type, values: Any, where: str) -> Any:
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


NESTED = {"DropoutRecipe": DropoutRecipe, "ReplayRecipe": ReplayRecipe}


def _typed(value: Any, kind: str, where: str) -> Any:
    """A YAML value as the field's annotation, a string, wants it."""
    if kind in NESTED:
        return construct(NESTED[kind], value, where)
    accepted: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    for option in kind.split(" | "):
        if option.startswith("dict["):
            if isinstance(value, dict) and value:
                inner_kind = option.removeprefix("dict[str, ").removesuffix("]")
                return {str(key): _typed(item, inner_kind, f"{where}: {key}") for key, item in value.items()}
        elif option.startswith("list["):
            inner = accepted[option[5:-1]]
            if isinstance(value, list) and all(
                isinstance(item, inner) and not isinstance(item, bool) for item in value
            ):
                return value
        elif isinstance(value, accepted[option]) and (option == "bool" or not isinstance(value, bool)):
            return float(value) if option == "float" else value
    raise ValueError(f"{where} is {value!r}, expected {kind.replace('None', 'nothing')}")


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    yaml = need("yaml", "reading a recipe")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {values!r}")
    return values


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe; ``overrides`` win over what the file says.

    ValueError for a key that does not exist (with the nearest that does), a value of the wrong type or out of range.
    """
    return make_recipe({**read_values(path), **(overrides or {})}, str(path))


def make_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe of keys and values."""
    recipe: Recipe = construct(Recipe, values, where)
    return recipe


@dataclass
class ExitRecipe:
    """Keys of a recipe for `layerskip train-exit`; `tools.recipe_reference` writes them to docs/recipes.md."""

    model: str = "smollm2"  # the frozen model: a directory, a hub name, or a name that a package provides
    # files of `layerskip distill`, tasks, or `hub:` datasets, as `tasks` of `layerskip train`
    texts: list[str] = field(default_factory=list)
    eval_texts: list[str] = field(default_factory=list)  # held-out texts; by default one text in 20
    whole: bool = False  # learn the rows of prompts, too
    # tasks whose prompts the model continues in the run, instead of `texts`
    prompts: list[str] = field(default_factory=list)
    written: int = 1000  # how many of the prompts
    new_tokens: int = 160  # the most tokens that each is continued by
    prompt_tokens: int = 420  # the longest prompt that is taken
    exit_layer: int = 2  # E
    draft_layers: int = 1  # n, the number of draft layers
    head_rank: int = 0  # r of a low-rank correction of the head, W + up · down
    # the layer that the draft layers are copies of at first; by default layer E, the next one
    init_layer: int | None = None
    # an exit to continue from instead: a directory or file, or the name of a model that comes with one
    init_exit: str | None = None
    draft_tokens: int = 8192  # how many tokens may be drafted, the most frequent ones; 0: all
    top_k: int = 16  # k, the tokens kept of each of the full model's distributions
    soft: float = 0.5  # s, the weight of the cross-entropy with the full model's distribution
    total_variation: float = 0.0  # v, the weight of the total variation distance; at most 1 together with `soft`
    dtype: str = "bfloat16"  # the model's
    # of the matmuls: `fp32`, or `bf16` where the machine has instructions for it; parameters are fp32
    precision: str = "fp32"
    minutes: float = 30.0  # of training, without `steps`
    steps: int | None = None  # of training; wins over `minutes`
    batch_tokens: int = 1024  # labelled rows a step, of all processes together
    max_length: int = 1024  # tokens of a text
    learning_rate: float = 1e-3  # its peak
    warmup: int = 50  # steps up to the peak
    decay: float = 0.3  # the share of the run in which the rate falls to 0
    beta2: float = 0.98  # AdamW's
    weight_decay: float = 0.01  # AdamW's
    max_grad_norm: float = 1.0  # the norm at which gradients are clipped
    eval_every: int = 100  # steps
    patience: int = 20  # evaluations without a better one after which the run ends
    seed: int = 0  # of every draw
    # a folder for the cached hidden states and labels, shared by runs of any E; by default in `output`
    trunk: str | None = None
    output: str = "layerskip-exit"  # the directory to write

    def __post_init__(self) -> None:
        if not self.texts and not self.prompts:
            raise ValueError("texts and prompts are empty, nothing to train on; `layerskip distill` writes texts")
        positive = ("exit_layer", "top_k", "minutes", "batch_tokens", "max_length", "learning_rate", "eval_every",
                    "patience", "max_grad_norm", "written", "new_tokens", "prompt_tokens")  # fmt: skip
        for key in positive:
            check_positive(key, getattr(self, key))
        for key in ("draft_layers", "head_rank", "draft_tokens", "warmup", "weight_decay"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        for key, known in {"dtype": ("bfloat16", "float16", "float32"), "precision": ("bf16", "fp32")}.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected one of {', '.join(known)}")
        if self.steps is not None:
            check_positive("steps", self.steps)
        weights = {"soft": self.soft, "total_variation": self.total_variation}
        for key, weight in weights.items():
            if not 0 <= weight <= 1:
                raise ValueError(f"{key} must be in [0, 1], got {weight}")
        if sum(weights.values()) > 1:
            raise ValueError(f"soft + total_variation must be at most 1, got {self.soft} + {self.total_variation}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"beta2 must be in (0, 1), got {self.beta2}")


def exit_recipe(path: Path | None, given: Mapping[str, Any]) -> ExitRecipe:
    """Read a recipe, if there is one; keys in ``given`` override the file's. ValueError as `read_recipe`."""
    values = read_values(path) if path is not None else {}
    if "blocks" in values:
        warnings.warn(f"{path}: the key 'blocks' is now 'draft_layers'", DeprecationWarning, stacklevel=2)
        values = with_new_keys(values)
    recipe: ExitRecipe = construct(ExitRecipe, {**values, **given}, str(path or "recipe"))
    return recipe


def with_new_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename keys that older recipes of exits have."""
    return {"draft_layers" if key == "blocks" else key: value for key, value in values.items()}


KEYS = tuple(entry.name for entry in fields(ExitRecipe))
