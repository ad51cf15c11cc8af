"""Training recipes as YAML: keys, defaults, validation. Read without importing torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .._imports import need

if TYPE_CHECKING:
    from .curriculum import AllExits, LayerDropout


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
    """What `layerskip train` reads.

    ``steps`` counts optimizer steps and wins over ``epochs``. ``tasks`` are names that `layerskip.training.data` knows,
    or paths of JSON-lines files with ``prompt`` and ``completion``; a mapping also gives each one's share of the
    examples. ``lora_rank`` is one rank or a mapping of layers to ranks, see `by_layer`; ``adapter`` is the folder of a
    LoRA adapter to go on from, whose ranks stay what they are. ``schedule`` "wsd" warms up,
    stays, and decays linearly over the last third. ``exit_layers`` are the candidates (default: all);
    ``exits_per_step`` is for the random curriculum, ``rotate_every`` for the rotational one; ``shallow_steps`` is the
    probability that a step stops at its deepest early exit. ``learning_rate`` is one rate or, as ``lora_rank``, a
    mapping of layers to rates. ``batch_tokens`` makes batches of so many padded tokens, not of ``batch_size`` examples.
    ``head_sample`` has early exits choose, in the loss, among the tokens that the data has as labels and so many
    others. ``interpolate`` shrinks what LoRA learned, in what is written. ``replay`` is general text that the full
    depth sees in every step, see `ReplayRecipe`.
    """

    model: str = "smollm2"
    tasks: list[str] | dict[str, float] = field(default_factory=lambda: ["parsing"])
    method: str = "lora"
    lora_rank: int | dict[str, int] = 32
    adapter: str | None = None
    interpolate: float = 1.0
    freeze_embedding: bool = True
    precision: str = "bf16"
    learning_rate: float | dict[str, float] = 2e-3
    schedule: str = "cosine"
    warmup: float = 0.03
    beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 24
    batch_tokens: int | None = None
    gradient_accumulation: int = 1
    max_length: int = 1024
    steps: int | None = None
    epochs: float = 1.0
    exit_layers: list[int] | None = None
    curriculum: str = "random"
    exits_per_step: int = 2
    rotate_every: int = 1
    shallow_steps: float = 0.0
    exit_weights: str = "paper"
    exit_weight_scale: float = 1.0
    head_sample: int = 0
    replay: ReplayRecipe = field(default_factory=ReplayRecipe)
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

    def make_curriculum(self, num_layers: int, total_steps: int) -> AllExits:
        """The curriculum for a model of ``num_layers``."""
        from .curriculum import ShallowSteps

        curriculum = self._full_curriculum(num_layers, total_steps)
        return ShallowSteps(curriculum, self.shallow_steps, self.seed) if self.shallow_steps else curriculum

    def _full_curriculum(self, num_layers: int, total_steps: int) -> AllExits:
        from .curriculum import AllExits, GradualCurriculum, RandomExits, RotationalCurriculum

        if self.curriculum == "rotational":
            return RotationalCurriculum(num_layers, self.rotate_every, self.exit_layers)
        if self.curriculum == "gradual":
            return GradualCurriculum(num_layers, total_steps, self.exit_layers)
        if self.curriculum == "random":
            return RandomExits(num_layers, self.exit_layers, self.exits_per_step, self.seed)
        return AllExits(num_layers, self.exit_layers)

    def make_dropout(self, num_layers: int, total_steps: int) -> LayerDropout | None:
        """The layer dropout, or None where no layer is ever dropped."""
        from .curriculum import LayerDropout, layer_dropout_rates

        rates = layer_dropout_rates(num_layers, self.layer_dropout.max, self.layer_dropout.kind)
        if not any(rates):
            return None
        return LayerDropout(rates, self.seed, total_steps, self.layer_dropout.scale)

    def check_exits(self, num_layers: int) -> None:
        """Raise ValueError where the exits do not fit a model of ``num_layers``."""
        from .curriculum import early_exit_weights

        candidates = self.make_curriculum(num_layers, 1).candidates
        early_exit_weights((*candidates, num_layers), num_layers, self.exit_weights, self.exit_weight_scale)
        if self.shallow_steps:  # a step may have no other exit than the first
            early_exit_weights(candidates[:1], num_layers, self.exit_weights, self.exit_weight_scale)


def check_positive(key: str, value: Any) -> None:
    """Raise ValueError for a number, or one of a mapping, that is not above 0."""
    for name, number in value.items() if isinstance(value, dict) else [("", value)]:
        if not number > 0:
            raise ValueError(f"{key}{name and f': {name}'} must be above 0, got {number}")


def by_layer(value: Number | Mapping[str, Number], num_layers: int, key: str) -> list[Number]:
    """A LoRA rank or a learning rate for each of ``num_layers`` layers.

    Parameters
    ----------
    value : number or mapping of str to number
        One for all, or ranges of layers 0…L-1 to numbers, such as ``{"0-3": 128, "4": 64, "5-29": 12}``.
    num_layers : int
        L.
    key : str
        Of the recipe, for what is raised.

    Raises
    ------
    ValueError
        For a range that is none or ends outside 0…L-1, a layer that is in two ranges or in none.
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

    Raises
    ------
    ValueError
        For a key that does not exist (with the nearest that does), a value of the wrong type or out of range.
    """
    return make_recipe({**read_values(path), **(overrides or {})}, str(path))


def make_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe of keys and values; see `read_recipe`."""
    recipe: Recipe = construct(Recipe, values, where)
    return recipe


@dataclass
class ExitRecipe:
    """What an exit is, what it learns from, and for how long.

    ``texts`` are what the model wrote, as `layerskip distill` makes them: tasks, JSON-lines files or hub datasets as in
    `Recipe`. ``prompts`` are tasks whose prompts the model continues in the run itself, the first ``written`` of those
    of at most ``prompt_tokens`` tokens, by at most ``new_tokens`` each; that saves the pass over finished texts. With
    ``whole``, the exit also learns what the model would write in the place of the prompts' tokens.
    ``eval_texts`` are held out; without them one text in 20 is. ``top_k`` tokens are kept of the full model's
    distributions; ``soft`` and ``total_variation`` weigh what the loss makes of these, see `row_losses`: sampled drafts
    are accepted with probability 1 - the latter. ``draft_tokens`` are how many tokens the exit may draft, the
    most frequent; 0: all. ``init_layer`` is the layer that the blocks begin as; by default layer E, which follows. With
    ``init_exit``, a directory, file or name, the run goes on from that exit instead, with its tokens. The run ends
    after ``steps``, or else after ``minutes`` of training; over the last ``decay`` of either the rate falls to 0. It
    also ends after ``patience`` evaluations without a better one. ``dtype`` is the model's; ``precision`` that of the
    training's matmuls, whose parameters are fp32. ``trunk`` is where what the model makes of the texts is kept, for
    other runs, too; by default in ``output``.
    """

    model: str = "smollm2"
    texts: list[str] = field(default_factory=list)
    eval_texts: list[str] = field(default_factory=list)
    whole: bool = False
    prompts: list[str] = field(default_factory=list)
    written: int = 1000
    new_tokens: int = 160
    prompt_tokens: int = 420
    exit_layer: int = 2
    blocks: int = 1
    head_rank: int = 0
    init_layer: int | None = None
    init_exit: str | None = None
    draft_tokens: int = 8192
    top_k: int = 16
    soft: float = 0.5
    total_variation: float = 0.0
    dtype: str = "bfloat16"
    precision: str = "fp32"
    minutes: float = 30.0
    steps: int | None = None
    batch_tokens: int = 1024
    max_length: int = 1024
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: float = 0.3
    beta2: float = 0.98
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    eval_every: int = 100
    patience: int = 20
    seed: int = 0
    trunk: str | None = None
    output: str = "layerskip-exit"

    def __post_init__(self) -> None:
        if not self.texts and not self.prompts:
            raise ValueError("texts and prompts are empty, nothing to train on; `layerskip distill` writes texts")
        positive = ("exit_layer", "top_k", "minutes", "batch_tokens", "max_length", "learning_rate", "eval_every",
                    "patience", "max_grad_norm", "written", "new_tokens", "prompt_tokens")  # fmt: skip
        for key in positive:
            check_positive(key, getattr(self, key))
        for key in ("blocks", "head_rank", "draft_tokens", "warmup", "weight_decay"):
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
    """Read a recipe, if there is one; what is given wins over what the file says.

    Raises
    ------
    ValueError
        As `layerskip.training.recipe.read_recipe`.
    """
    values = read_values(path) if path is not None else {}
    recipe: ExitRecipe = construct(ExitRecipe, {**values, **given}, str(path or "recipe"))
    return recipe


KEYS = tuple(entry.name for entry in fields(ExitRecipe))
