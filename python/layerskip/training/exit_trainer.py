"""Train an exit on what a frozen model made of texts."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._files import write_atomically
from . import processes
from ._seeds import generator
from .exit_loss import Targets, Weights, draft_loss, drafts
from .exit_module import Packed, TrainableExit
from .exit_recipe import ExitRecipe
from .kept import Text

POSITIONS = 3  # of a round's drafts, whose agreement is told apart


class Texts(Protocol):
    """A `Trunk`, or whatever else has texts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Text: ...

    def rows(self, index: int, /) -> int:
        """How many labelled rows a text has."""


class Agreement(NamedTuple):
    """How often an exit drafts the model's own token.

    ``all`` rows; ``positions``, of the first, second, … draft of a round, where those before it agreed;
    ``tokens_per_round``, with as many drafts, which is 1 without any agreement. ``sampled``: how probably a draft that
    is sampled, at temperature 1, is accepted, the mean of `acceptances`.
    """

    all: float
    positions: tuple[float, ...]
    tokens_per_round: float
    sampled: float


@dataclass
class State:
    """Where a run is. ``decay_from`` and ``end`` are steps; a run by minutes knows them once it begins to decay."""

    step: int = 0
    seconds: float = 0.0
    decay_from: int | None = None
    end: int | None = None
    best: float = -1.0
    best_step: int = 0
    stopped_early: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.stopped_early or (self.end is not None and self.step >= self.end)


class ExitTrainer:
    """Trains an exit; of the model nothing but the head's rows is needed, and nothing changes.

    Where torchrun has started several processes, each computes its share of every batch. So a step does the same for
    any number of them, but for rounding; all have the same state.

    Parameters
    ----------
    recipe : ExitRecipe
    module : TrainableExit
    texts : Texts
        To train on.
    held_out : mapping of str to Texts
        By name; the best exit is the one with the greatest mean of their ``tokens_per_round``.
    clock : callable
        Gives seconds.
    """

    def __init__(
        self,
        recipe: ExitRecipe,
        module: TrainableExit,
        texts: Texts,
        held_out: Mapping[str, Texts],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.recipe, self.module, self.texts, self.held_out = recipe, module, texts, held_out
        self.state = State()
        if recipe.steps is not None:
            self.state.end = recipe.steps
            self.state.decay_from = recipe.steps - math.floor(recipe.steps * recipe.decay)
        self._clock = clock
        self._device = module.norm_weight.device
        self._dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self._head = module.head_rows.to(self._dtype)
        self._weights = Weights(recipe.soft, recipe.total_variation)
        self._optimizer = torch.optim.AdamW(
            module.parameters(), lr=recipe.learning_rate, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay
        )

    def train(self, progress: Callable[[State, float], None], evaluated: Callable[[bool], None]) -> None:
        """Train to the end, from where the state is.

        Parameters
        ----------
        progress : callable
            ``(state, loss)``, after each step.
        evaluated : callable
            ``(whether it is the best so far)``, after each evaluation; what it takes is not training time.
        """
        batches = self._batches()
        losses: list[float] = []
        while not self.state.finished:
            began = self._clock()
            losses.append(self._step(next(batches)))
            self.state.step += 1
            self.state.seconds += processes.of_first(self._clock() - began)
            self._plan_end()
            progress(self.state, losses[-1])
            if self.state.step % self.recipe.eval_every == 0 or self.state.finished:
                best = self._evaluate(sum(losses) / len(losses))
                losses.clear()
                evaluated(best)

    def _plan_end(self) -> None:
        """Of a run by minutes: begin to decay when its share of them is left."""
        state, recipe = self.state, self.recipe
        if state.decay_from is None and state.seconds >= 60 * recipe.minutes * (1 - recipe.decay):
            state.decay_from = state.step
            state.end = state.step + round(state.step * recipe.decay / (1 - recipe.decay))

    def _rate(self) -> float:
        """The learning rate of the step that comes."""
        state, rate = self.state, self.recipe.learning_rate * min(1.0, (self.state.step + 1) / (self.recipe.warmup + 1))
        if state.decay_from is None or state.end is None or state.step < state.decay_from:
            return rate
        return rate * (state.end - state.step) / (state.end - state.decay_from + 1)

    def _batches(self) -> Iterator[list[int]]:
        """Batches without end, from the one that comes; a function of the seed and the step."""
        begin, epoch = 0, 0
        while True:
            batches = self._epoch(epoch)
            yield from batches[max(self.state.step - begin, 0) :]
            begin, epoch = begin + len(batches), epoch + 1

    def _epoch(self, epoch: int) -> list[list[int]]:
        order = torch.randperm(len(self.texts), generator=generator("exit's texts", self.recipe.seed, epoch)).tolist()
        batches: list[list[int]] = [[]]
        size = 0
        for index in order:
            if size >= self.recipe.batch_tokens:
                batches.append([])
                size = 0
            batches[-1].append(index)
            size += self.texts.rows(index)
        return batches

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    def _hidden(self, texts: Sequence[Text]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Normed states of the labelled rows, and the head's correction for them."""
        with self._autocast():
            hidden = self.module(Packed.of(texts, self._device, torch.float32)).to(self._dtype)
            return hidden, self.module.correction(hidden)

    def _targets(self, texts: Sequence[Text]) -> Targets:
        ids, probabilities = (
            torch.cat(parts).to(self._device) for parts in zip(*(text.labels for text in texts), strict=True)
        )
        return Targets.of(ids, probabilities, self.module.token_ids)

    def _step(self, batch: Sequence[int]) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        loss = self._gradients(batch)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.state.step} is {loss}; lower learning_rate")
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _gradients(self, batch: Sequence[int]) -> float:
        """Make the gradients of the mean loss of a batch's rows; returns that."""
        texts = [self.texts[index] for index in processes.share(batch)]
        total = self._head.new_zeros(1, dtype=torch.float32)
        if texts:
            hidden, correction = self._hidden(texts)
            part = len(hidden) / sum(map(self.texts.rows, batch))
            loss = part * draft_loss(hidden, self._head, self._targets(texts), self._weights, correction)
            loss.backward()
            total += loss.detach()
        slopes = []
        for parameter in self.module.parameters():
            if parameter.grad is None:  # a process without texts
                parameter.grad = torch.zeros_like(parameter)
            slopes.append(parameter.grad)
        processes.add([total, *slopes])
        return float(total)

    def _evaluate(self, loss: float) -> bool:
        """Measure the held-out texts; whether the exit is better than ever before."""
        state = self.state
        found = {name: self.agreement(texts) for name, texts in self.held_out.items()}
        score = sum(one.tokens_per_round for one in found.values()) / len(found)
        state.history.append(
            {"step": state.step, "seconds": round(state.seconds, 1), "loss": loss, "rate": self._rate(),
             "held out": {name: one._asdict() for name, one in found.items()}}
        )  # fmt: skip
        better = score > state.best
        if better:
            state.best, state.best_step = score, state.step
        elif sum(entry["step"] > state.best_step for entry in state.history) >= self.recipe.patience:
            state.stopped_early = True
        return better

    @torch.no_grad()
    def agreement(self, texts: Texts) -> Agreement:
        """How often the exit drafts the model's own token.

        A block sees the frozen layers' state of every token, drafted or not, and a draft counts only where those before
        it were right. So what is drafted in a round is what is drafted on the text itself, row by row.
        """
        flags: list[list[bool]] = []
        accepted: list[float] = []
        for index in processes.share(range(len(texts))):
            hidden, correction = self._hidden([texts[index]])
            found = drafts(hidden, self._head, self._targets([texts[index]]), correction)
            flags.append(found.agree.tolist())
            accepted += found.accepted.tolist()
        accepted = list(chain.from_iterable(processes.all_of(accepted)))
        return Agreement(*rounds([*chain.from_iterable(processes.all_of(flags))]), math.fsum(accepted) / len(accepted))

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        buffer = io.BytesIO()
        parts = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save({"state": asdict(self.state), **parts}, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = torch.load(path, map_location=self._device, weights_only=True)
        self.state = State(**saved["state"])
        self.module.load_state_dict(saved["module"])
        self._optimizer.load_state_dict(saved["optimizer"])


def rounds(
    flags: Sequence[Sequence[bool]], num_speculations: int = POSITIONS
) -> tuple[float, tuple[float, ...], float]:
    """What rounds of some drafts give on texts, of which the flags say where a draft is the model's own token.

    The first three parts of an `Agreement`.
    """
    drafted, agreed = [0] * num_speculations, [0] * num_speculations
    made = 0
    for text in flags:
        place = 0
        while place < len(text):
            made += 1
            for position in range(num_speculations):
                if place == len(text):
                    break
                drafted[position] += 1
                place += 1
                if not text[place - 1]:
                    break  # verification gives this row's token
                agreed[position] += 1
            else:
                place += 1  # verification gives one more after the last draft
    total = sum(map(len, flags))
    return (
        sum(map(sum, flags)) / total,
        tuple(yes / all_ if all_ else 0.0 for yes, all_ in zip(agreed, drafted, strict=True)),
        total / made,
    )
