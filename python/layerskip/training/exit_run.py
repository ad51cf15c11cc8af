"""Run the recipe of an exit: load model and texts, cache hidden states, make the trainer."""

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
from .exit_trainer import ExitTrainer, ExitTrainerState, TrainableExit
from .hidden_state_cache import CachedTexts, GeneratedTextCache, TextCache, model_digests
from .output_dir import HIDDEN_STATES, TOKENIZER, digest
from .recipe import ExitRecipe
from .run import load_pairs

HELD_OUT = 20  # one text in 20 is held out, if the recipe gives none

Pairs = Sequence[Mapping[str, list[int]]]


class ExitRun:
    """The model and the encoded texts of a recipe; `trainer` computes what is missing and makes the trainer."""

    def __init__(self, recipe: ExitRecipe, device: torch.device) -> None:
        self.recipe = recipe
        hf_model, tokenizer = load(recipe.model, getattr(torch, recipe.dtype))
        self.model: LayerSkipModel = adapt(hf_model.to(device))
        self.model.requires_grad_(False)
        self.eos_token_id: int = tokenizer.eos_token_id
        self._check_layers()
        described = repr((sorted(tokenizer.get_vocab().items()), self.eos_token_id))
        self._digests = {**model_digests(self.model), TOKENIZER: hashlib.sha256(described.encode()).hexdigest()}
        self._init_exit = None if recipe.init_exit is None else Exit.load(recipe.init_exit)
        self._texts = [encode(tokenizer, _examples(task), recipe.max_length, recipe.whole) for task in recipe.texts]
        self._prompts = [_prompts(task, tokenizer, recipe.prompt_tokens) for task in recipe.prompts]
        self._held_out = {
            kind: encode(tokenizer, examples, recipe.max_length)
            for task in recipe.eval_texts
            for kind, examples in _by_kind(task).items()
        }

    @property
    def data(self) -> dict[str, Any]:
        """What the bits of a step depend on beside the recipe."""
        return {
            "digest of the texts": [digest(pairs) for pairs in self._texts],
            "digest of the held-out texts": [digest(pairs) for pairs in self._held_out.values()],
            **self._digests,
            "number of processes": PartialState().num_processes,
            **({"digest of the prompts": [digest(pairs) for pairs in self._prompts]} if self._prompts else {}),
            **({} if self._init_exit is None else {"digest of the first exit": _exit_digest(self._init_exit)}),
        }

    def trainer(self, progress: Callable[[int, int], None] = lambda done, total: None) -> ExitTrainer:
        """Run the model on the texts that are not cached yet, and make the trainer.

        ``progress(done, total)`` gets the numbers of cached and of all texts.
        """
        recipe, done = self.recipe, 0
        training: list[TextCache | GeneratedTextCache] = [self._cache(pairs) for pairs in self._texts]
        training += [self._generated(prompts) for prompts in self._prompts]
        held_out = {name: self._cache(pairs) for name, pairs in self._held_out.items()}
        caches = [*training, *held_out.values()]
        total = sum(map(len, caches))

        def advance(texts: int) -> None:
            nonlocal done
            done += texts
            progress(done, total)

        for cache in caches:
            cache.compute(advance)
        texts, evaluated = _split(training, held_out)
        length = 1 + max(len(some[index].states) for some in (texts, *evaluated.values()) for index in range(len(some)))
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
        if self._init_exit is not None:
            module.load_exit(self._init_exit)
        return ExitTrainer(recipe, module, texts, evaluated)

    def _folder(self, pairs: Pairs) -> Path:
        return Path(self.recipe.trunk or Path(self.recipe.output) / HIDDEN_STATES) / digest(pairs)[:16]

    def _cache(self, pairs: Pairs) -> TextCache:
        recipe = self.recipe
        return TextCache(self._folder(pairs), self.model, recipe.exit_layer, recipe.top_k, pairs, self._digests)

    def _generated(self, prompts: Pairs) -> GeneratedTextCache:
        recipe, ids = self.recipe, [prompt["input_ids"] for prompt in prompts]
        return GeneratedTextCache(
            self._folder(prompts), self.model, recipe.exit_layer, recipe.top_k, ids, recipe.written, recipe.new_tokens,
            self.eos_token_id, recipe.whole, self._digests,
        )  # fmt: skip

    def _token_ids(self, texts: CachedTexts) -> Tensor | None:
        """The tokens that the model chooses most often in the texts, and its EOS token."""
        size = self.recipe.draft_tokens
        if self._init_exit is not None:
            return self._init_exit.token_ids
        if not size:
            return None
        chosen = (texts[index].top_k.ids[:, 0].tolist() for index in range(len(texts)))
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


def _split(
    training: Sequence[TextCache | GeneratedTextCache], held_out: Mapping[str, TextCache]
) -> tuple[CachedTexts, dict[str, CachedTexts]]:
    """Training texts, and held-out texts by name: the given ones, or some of all."""
    every = [(cache, index) for cache in training for index in range(len(cache))]
    if held_out:
        return CachedTexts(every), {
            name: CachedTexts([(cache, index) for index in range(len(cache))]) for name, cache in held_out.items()
        }
    texts = CachedTexts([text for number, text in enumerate(every) if number % HELD_OUT])
    if not len(texts):
        raise ValueError("one text is too few to hold some out; give eval_texts, or more texts")
    return texts, {"held out": CachedTexts(every[::HELD_OUT])}


def _examples(task: str) -> list[Any]:
    return list(chain.from_iterable(load_pairs([task]).values()))


def _prompts(task: str, tokenizer: Any, max_tokens: int) -> list[dict[str, list[int]]]:
    """The prompts of a task that have at most ``max_tokens`` tokens, without labels."""
    texts = [pair["prompt"] if isinstance(pair, dict) else pair.prompt for pair in _examples(task)]
    encoded = [list(tokenizer(text).input_ids) for text in texts if text]
    fitting = [{"input_ids": ids, "labels": []} for ids in encoded if 0 < len(ids) <= max_tokens]
    if not fitting:
        raise ValueError(f"none of {len(texts)} prompts of {task} has at most {max_tokens} tokens")
    return fitting


def _by_kind(task: str) -> dict[str, list[Any]]:
    """Examples by their "task" in a file, or all as one kind."""
    kinds: dict[str, list[Any]] = {}
    for pair in _examples(task):
        kind = pair.get("task") if isinstance(pair, dict) else None
        kinds.setdefault(kind or Path(task).stem, []).append(pair)
    return kinds


def _exit_digest(trained: Exit) -> str:
    sha256 = hashlib.sha256(trained.norm_weight.float().numpy().tobytes())
    for layer in trained.draft_layers:
        for weight in layer:
            sha256.update(b"" if weight is None else weight.float().numpy().tobytes())
    return sha256.hexdigest()


def curve(history: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of the loss, and of the agreement on each kind of held-out text, over the steps."""
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


def best_figures(state: ExitTrainerState) -> dict[str, Any]:
    """The figures of the best exit of a run."""
    entry = next(entry for entry in state.history if entry["step"] == state.best_step)
    return {key: entry[key] for key in ("step", "seconds", "held out")}
