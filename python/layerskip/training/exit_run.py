"""An exit's recipe carried out: model, texts, what the model makes of them, trainer."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ..decoding import DraftHead
from ..models import Exit, LayerSkipModel, adapt, load
from .batching import encode
from .exit_trainer import ExitTrainer, State, TrainableExit
from .hidden_state_cache import KeptTexts, Text, Trunk, WrittenTexts, model_digest
from .output_dir import HIDDEN_STATES, digest
from .recipe import ExitRecipe
from .run import load_pairs

HELD_OUT = 20  # one text in so many, where none are given


class ExitRun:
    """All that a recipe names. Making it reads the model and the texts, and computes nothing.

    Parameters
    ----------
    recipe : ExitRecipe
    device : torch.device
    """

    def __init__(self, recipe: ExitRecipe, device: torch.device) -> None:
        self.recipe = recipe
        hf_model, tokenizer = load(recipe.model, getattr(torch, recipe.dtype))
        self.model: LayerSkipModel = adapt(hf_model.to(device))
        self.model.requires_grad_(False)
        self.eos_token_id: int = tokenizer.eos_token_id
        self._check_layers()
        self._first = None if recipe.init_exit is None else Exit.load(recipe.init_exit)
        self._texts = [_encoded(task, tokenizer, recipe) for task in recipe.texts]
        self._prompts = [_prompts(task, tokenizer, recipe) for task in recipe.prompts]
        self._held_out = {
            name: pairs for task in recipe.eval_texts for name, pairs in _by_kind(task, tokenizer, recipe)
        }

    @property
    def data(self) -> dict[str, Any]:
        """What a step's bits depend on beside the recipe: the texts, as tokens, the weights, the processes."""
        return {
            "digest of the texts": [digest(pairs) for pairs in self._texts],
            "digest of the held-out texts": [digest(pairs) for pairs in self._held_out.values()],
            "digest of the model": model_digest(self.model),
            "number of processes": PartialState().num_processes,
            **({"digest of the prompts": [digest(pairs) for pairs in self._prompts]} if self._prompts else {}),
            **({} if self._first is None else {"digest of the first exit": _exit_digest(self._first)}),
        }

    def trainer(self, progress: Callable[[int, int], None] = lambda done, of: None) -> ExitTrainer:
        """Let the model run on the texts on which it has not run yet; then all is ready to train.

        ``progress`` is told of how many texts, of how many, there is what the model makes of them.
        """
        recipe, done = self.recipe, 0
        own = [self._trunk(pairs) for pairs in self._texts] + [self._written(prompts) for prompts in self._prompts]
        given = [self._trunk(pairs) for pairs in self._held_out.values()]
        total = sum(map(len, [*own, *given]))

        def advance(texts: int) -> None:
            nonlocal done
            done += texts
            progress(done, total)

        for kept in (*own, *given):
            kept.compute(advance)
        texts, held_out = self._split(own, given)
        length = 1 + max(len(some[index].states) for some in (texts, *held_out.values()) for index in range(len(some)))
        module = TrainableExit(
            self.model,
            recipe.exit_layer,
            recipe.draft_layers,
            recipe.exit_layer if recipe.init_layer is None else recipe.init_layer,
            self._token_ids(texts),
            recipe.head_rank,
            length,
            recipe.seed,
        )
        if self._first is not None:
            module.begin_as(self._first)
        return ExitTrainer(recipe, module, texts, held_out)

    def _folder(self, pairs: Sequence[Mapping[str, list[int]]]) -> Path:
        return Path(self.recipe.trunk or Path(self.recipe.output) / HIDDEN_STATES) / digest(pairs)[:16]

    def _trunk(self, pairs: Sequence[Mapping[str, list[int]]]) -> Trunk:
        return Trunk(self._folder(pairs), self.model, self.recipe.exit_layer, self.recipe.top_k, pairs)

    def _written(self, prompts: Sequence[Mapping[str, list[int]]]) -> WrittenTexts:
        recipe = self.recipe
        return WrittenTexts(
            self._folder(prompts),
            self.model,
            recipe.exit_layer,
            recipe.top_k,
            [prompt["input_ids"] for prompt in prompts],
            recipe.written,
            recipe.new_tokens,
            self.eos_token_id,
            recipe.whole,
        )

    def _split(
        self, own: Sequence[Trunk | WrittenTexts], given: Sequence[Trunk]
    ) -> tuple[Selection, dict[str, Selection]]:
        """What is trained on, and what is held out: given texts, or some of all."""
        every = [(trunk, index) for trunk in own for index in range(len(trunk))]
        if given:
            held_out = {
                name: Selection([(trunk, index) for index in range(len(trunk))])
                for name, trunk in zip(self._held_out, given, strict=True)
            }
            return Selection(every), held_out
        texts = Selection([text for number, text in enumerate(every) if number % HELD_OUT])
        if not len(texts):
            raise ValueError("one text is too few to hold some out; give eval_texts, or more texts")
        return texts, {"held out": Selection(every[::HELD_OUT])}

    def _token_ids(self, texts: Selection) -> Tensor | None:
        """The tokens that the model itself chooses most often in the texts, and its EOS token."""
        size = self.recipe.draft_tokens
        if self._first is not None:
            return self._first.token_ids
        if not size:
            return None
        chosen = (texts[index].labels.ids[:, 0].tolist() for index in range(len(texts)))
        return DraftHead.from_tokens(chosen, self.model.vocab_size, self.eos_token_id, size).token_ids

    def _check_layers(self) -> None:
        recipe, layers = self.recipe, self.model.num_layers
        if recipe.exit_layer >= layers:
            raise ValueError(f"exit_layer must be in 1 … {layers - 1} for {layers} layers, got {recipe.exit_layer}")
        if recipe.init_layer is not None and not 0 <= recipe.init_layer < layers:
            raise ValueError(f"init_layer must be in 0 … {layers - 1}, got {recipe.init_layer}")
        if recipe.draft_tokens > self.model.vocab_size:
            raise ValueError(
                f"draft_tokens is {recipe.draft_tokens}, the vocabulary has {self.model.vocab_size} tokens"
            )
        if not recipe.draft_layers and not recipe.head_rank:
            raise ValueError("draft_layers and head_rank are 0, so nothing but a norm would be trained")


class Selection:
    """Some texts of some trunks."""

    def __init__(self, places: Sequence[tuple[KeptTexts, int]]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Text:
        trunk, place = self._places[index]
        return trunk[place]

    def rows(self, index: int) -> int:
        """How many labelled rows a text has."""
        trunk, place = self._places[index]
        return trunk.rows(place)


def _encoded(task: str, tokenizer: Any, recipe: ExitRecipe) -> list[dict[str, list[int]]]:
    pairs = list(chain.from_iterable(load_pairs([task]).values()))
    return encode(tokenizer, pairs, recipe.max_length, recipe.whole)


def _prompts(task: str, tokenizer: Any, recipe: ExitRecipe) -> list[dict[str, list[int]]]:
    """The prompts of a task that are short enough; none has a label."""
    pairs = chain.from_iterable(load_pairs([task]).values())
    texts = [pair["prompt"] if isinstance(pair, dict) else pair.prompt for pair in pairs]
    encoded = [list(tokenizer(text).input_ids) for text in texts if text]
    kept = [{"input_ids": ids, "labels": []} for ids in encoded if 0 < len(ids) <= recipe.prompt_tokens]
    if not kept:
        raise ValueError(f"none of {len(texts)} prompts of {task} has at most {recipe.prompt_tokens} tokens")
    return kept


def _exit_digest(first: Exit) -> str:
    made = hashlib.sha256(first.norm_weight.float().numpy().tobytes())
    for layer in first.draft_layers:
        for weight in layer:
            made.update(b"" if weight is None else weight.float().numpy().tobytes())
    return made.hexdigest()


def _by_kind(task: str, tokenizer: Any, recipe: ExitRecipe) -> list[tuple[str, list[dict[str, list[int]]]]]:
    """Held-out texts by the "task" that a file says they are of, or all as one; prompts have no labels."""
    pairs = list(chain.from_iterable(load_pairs([task]).values()))
    kinds: dict[str, list[Any]] = {}
    for pair in pairs:
        kind = pair.get("task") if isinstance(pair, dict) else None
        kinds.setdefault(kind or Path(task).stem, []).append(pair)
    return [(kind, encode(tokenizer, part, recipe.max_length)) for kind, part in kinds.items()]


def curve(history: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: the loss, and how many tokens a round gives on each kind of held-out text, over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [entry["step"] for entry in history]
    left.plot(steps, [entry["loss"] for entry in history])
    left.set(xlabel="step", ylabel="loss")
    for name in history[-1]["held out"] if history else ():
        right.plot(steps, [100 * entry["held out"][name]["all"] for entry in history], label=name)
    right.set(xlabel="step", ylabel="agreement on held-out text, %")
    if history:
        right.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def found(state: State) -> dict[str, Any]:
    """What the best exit of a run reached."""
    entry = next(entry for entry in state.history if entry["step"] == state.best_step)
    return {key: entry[key] for key in ("step", "seconds", "held out")}
