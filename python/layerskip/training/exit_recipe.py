"""A training run of an exit as keys and values: what `layerskip train-exit` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .recipe import check_positive, construct, read_values


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
