"""Train an exit on the cached hidden states of a frozen model."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn

from layerskip_kernels import LayerWeights

from .._files import write_atomically
from ..models import LayerSkipModel
from ..models.exit import Exit, fingerprint
from .curriculum import generator
from .exit_analysis import simulate_rounds
from .hidden_state_cache import CachedText, CachedTexts, own_share
from .losses import LossWeights, Targets, draft_agreement, draft_loss
from .recipe import ExitRecipe

NUM_SPECULATIONS = 3  # of the simulated rounds


class VarlenTexts(NamedTuple):
    """Concatenated texts: ``states`` [N, D] after layer E. The rows of each text from its ``firsts`` on have labels."""

    states: Tensor
    lengths: list[int]
    firsts: list[int]

    @classmethod
    def of(cls, texts: Sequence[CachedText], device: torch.device) -> VarlenTexts:
        states = torch.cat([text.states for text in texts]).to(device, torch.float32)
        return cls(states, [len(text.states) for text in texts], [text.first for text in texts])

    def starts(self) -> list[int]:
        return torch.tensor([0, *self.lengths]).cumsum(0).tolist()

    def rows(self, firsts: Sequence[int]) -> Tensor:
        """Indices of the rows of each text from ``firsts`` on."""
        spans = zip(self.starts(), firsts, self.lengths, strict=False)
        return torch.cat([torch.arange(start + first, start + n) for start, first, n in spans]).to(self.states.device)


class DraftLayer(nn.Module):
    """A differentiable decoder layer on varlen texts, as `layerskip_kernels.partial_forward` defines it.

    ``rope_tables`` are cos and sin, [≥ T, C/2] fp32.
    """

    def __init__(self, weights: LayerWeights, head_dim: int, eps: float, rope_tables: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self._head_dim, self._eps, self._rope_tables = head_dim, eps, rope_tables
        for name, weight in weights._asdict().items():
            copied = None if weight is None else nn.Parameter(weight.detach().float().clone())
            self.register_parameter(name, copied)

    def weights(self) -> LayerWeights:
        return LayerWeights(*(getattr(self, name) for name in LayerWeights._fields))

    def copies(self, dtype: torch.dtype) -> LayerWeights:
        """Copy the parameters to the CPU."""
        named = {name: weight for name, weight in self.weights()._asdict().items() if weight is not None}
        return LayerWeights(**{name: _copy(weight, dtype) for name, weight in named.items()})

    def forward(self, texts: VarlenTexts, labelled_only: bool) -> Tensor:
        """Hidden states [R, D] after the layer, of all rows or of the labelled ones; all rows are keys and values."""
        firsts = texts.firsts if labelled_only else [0] * len(texts.firsts)
        head_dim, eps, rows = self._head_dim, self._eps, texts.rows(firsts)
        positions = torch.cat([torch.arange(length) for length in texts.lengths]).to(rows.device)
        cos, sin = (table[positions, None] for table in self._rope_tables)

        w = self.weights()
        normed = F.rms_norm(texts.states, texts.states.shape[1:], w.attn_norm, eps)
        q = F.linear(normed[rows], w.q, w.q_bias).unflatten(1, (-1, head_dim))
        k = F.linear(normed, w.k, w.k_bias).unflatten(1, (-1, head_dim))
        v = F.linear(normed, w.v, w.v_bias).unflatten(1, (-1, head_dim))
        if w.q_norm is not None and w.k_norm is not None:
            q, k = F.rms_norm(q, (head_dim,), w.q_norm, eps), F.rms_norm(k, (head_dim,), w.k_norm, eps)
        q, k = _rope(q, cos[rows], sin[rows]), _rope(k, cos, sin)
        attended = _attend(q, k, v.to(k.dtype), texts.starts(), firsts)
        hidden = texts.states[rows] + F.linear(attended.flatten(1), w.o)
        normed = F.rms_norm(hidden, hidden.shape[1:], w.mlp_norm, eps)
        return hidden + F.linear(F.silu(F.linear(normed, w.gate)) * F.linear(normed, w.up), w.down)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [N, heads, C], as in `layerskip_kernels.rope_kv_append`."""
    one, two = x.float().chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], firsts: Sequence[int]) -> Tensor:
    """Causal attention within each text: q [R, H, C] of its rows from ``first`` on, k and v [N, G, C] of all."""
    outs, done = [], 0
    for start, end, first in zip(starts[:-1], starts[1:], firsts, strict=True):
        length = end - start
        queries, keys, values = (
            part.transpose(0, 1)[None] for part in (q[done : done + length - first], k[start:end], v[start:end])
        )
        mask = torch.ones(length - first, length, dtype=torch.bool, device=q.device).tril(first)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
        done += length - first
    return torch.cat(outs)


class TrainableExit(nn.Module):
    """Differentiable draft layers, norm and head correction of an exit; the model does not change.

    The draft layers start as copies of layer ``init_layer`` of the model, the norm as a copy of its final norm, and the
    head's correction of rank ``head_rank`` (0 for none) as zero. ``token_ids`` [S], sorted int64, are the tokens that
    may be drafted, by default all. ``max_length`` is the length of the longest text.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        exit_layer: int,
        num_draft_layers: int,
        init_layer: int,
        token_ids: Tensor | None = None,
        head_rank: int = 0,
        max_length: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        decoder = model.decoder
        decoder.new_cache(1, max_length)  # makes the rotary tables long enough
        self.exit_layer, self.num_layers, self.vocab_size = exit_layer, model.num_layers, model.vocab_size
        self.draft_layers = nn.ModuleList(
            DraftLayer(decoder.template(init_layer), decoder.head_dim, decoder.eps, decoder.rope_tables)
            for _ in range(num_draft_layers)
        )
        self._eps, self._model_fingerprint = decoder.eps, fingerprint(model)
        self.norm_weight = nn.Parameter(model.head.norm_weight.detach().float().clone())
        self.token_ids = None if token_ids is None else token_ids.to(model.device)
        weight = model.head.head_weight.detach()
        self.head_rows = weight if self.token_ids is None else weight[self.token_ids]
        self.head_down = self.head_up = None
        if head_rank:
            size = weight.shape[1]
            down = torch.randn(head_rank, size, generator=generator("head correction", seed)) * size**-0.5
            self.head_down = nn.Parameter(down.to(model.device))
            self.head_up = nn.Parameter(torch.zeros(len(self.head_rows), head_rank, device=model.device))

    @torch.no_grad()
    def load_exit(self, trained: Exit) -> None:
        """Copy the parameters of an exit of the same shape; ValueError if its layer or draft layers differ."""
        mine, theirs = (self.exit_layer, len(self.draft_layers)), (trained.exit_layer, trained.num_draft_layers)
        if mine != theirs:
            raise ValueError(f"init_exit has layer and draft layers {theirs}, the recipe has {mine}")
        if (trained.head_down is None) != (self.head_down is None):
            raise ValueError("one of the recipe and init_exit has a correction of the head, the other has none")
        self.norm_weight.copy_(trained.norm_weight)
        for layer, weights in zip(self.draft_layers, trained.draft_layers, strict=True):
            for name, weight in weights._asdict().items():
                if weight is not None:
                    getattr(layer, name).copy_(weight)
        down, up = trained.head_down, trained.head_up
        if self.head_down is not None and self.head_up is not None and down is not None and up is not None:
            self.head_down.copy_(down)
            self.head_up.copy_(up if self.token_ids is None else up[self.token_ids.cpu()])

    def forward(self, texts: VarlenTexts) -> Tensor:
        """Normed hidden states [R, D] of the labelled rows, the input of the head."""
        for number, layer in enumerate(self.draft_layers):
            last = number == len(self.draft_layers) - 1
            texts = texts._replace(states=layer(texts, labelled_only=last))
        hidden = texts.states if self.draft_layers else texts.states[texts.rows(texts.firsts)]
        return F.rms_norm(hidden, hidden.shape[1:], self.norm_weight, self._eps)

    def correction(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Factors a [R, r] and b [S, r] of a bᵀ, which is added to the logits of normed states [R, D]; or None."""
        if self.head_down is None or self.head_up is None:
            return None
        return F.linear(hidden, self.head_down), self.head_up

    def exit(self, dtype: torch.dtype = torch.bfloat16) -> Exit:
        """Copy the exit for decoding, in ``dtype``."""
        draft_layers = [layer.copies(dtype) for layer in self.draft_layers if isinstance(layer, DraftLayer)]
        down = up = None
        if self.head_down is not None and self.head_up is not None:
            down, up = _copy(self.head_down, dtype), _copy(self.head_up, dtype)
            if self.token_ids is not None:
                up = up.new_zeros(self.vocab_size, up.shape[1]).index_copy_(0, self.token_ids.cpu(), up)
        ids = None if self.token_ids is None else self.token_ids.cpu()
        norm = _copy(self.norm_weight, dtype)
        sizes = self.num_layers, self.vocab_size
        return Exit(self.exit_layer, norm, *sizes, draft_layers, ids, down, up, self._model_fingerprint)


class Agreement(NamedTuple):
    """How often an exit drafts the token of the model.

    ``all``: over all rows. ``positions`` and ``tokens_per_round`` are those of `exit_analysis.simulate_rounds`.
    ``sampled``: mean acceptance probability of draft tokens that are sampled at temperature 1.
    """

    all: float
    positions: tuple[float, ...]
    tokens_per_round: float
    sampled: float


@dataclass
class ExitTrainerState:
    """Progress of a run; ``decay_from`` and ``end`` are steps, unknown in a run by minutes until the rate decays."""

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
        return self.stopped_early or (self.end is not None and self.step >= self.end)


class ExitTrainer:
    """Train an exit on ``texts``; the best exit has the greatest mean ``tokens_per_round`` on the ``held_out`` texts.

    Under torchrun each process computes its share of every batch, so a step is the same for any number of processes, up
    to rounding; all have the same state. ``clock`` returns seconds.
    """

    def __init__(
        self,
        recipe: ExitRecipe,
        module: TrainableExit,
        texts: CachedTexts,
        held_out: Mapping[str, CachedTexts],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.recipe, self.module, self.texts, self.held_out = recipe, module, texts, held_out
        self.state = ExitTrainerState()
        if recipe.steps is not None:
            self.state.end = recipe.steps
            self.state.decay_from = recipe.steps - math.floor(recipe.steps * recipe.decay)
        self._clock = clock
        self._device = module.norm_weight.device
        self._dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self._head = module.head_rows.to(self._dtype)
        self._weights = LossWeights(recipe.soft, recipe.total_variation)
        self._optimizer = torch.optim.AdamW(
            module.parameters(), lr=recipe.learning_rate, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay
        )

    def train(self, on_step: Callable[[ExitTrainerState, float], None], on_evaluate: Callable[[bool], None]) -> None:
        """Train from the current state to the end; call ``on_step(state, loss)`` and ``on_evaluate(best so far)``.

        Only steps count as training time.
        """
        batches = self._batches()
        losses: list[float] = []
        while not self.state.finished:
            began = self._clock()
            losses.append(self._step(next(batches)))
            self.state.step += 1
            self.state.seconds += broadcast_object_list([self._clock() - began])[0]
            self._plan_end()
            on_step(self.state, losses[-1])
            if self.state.step % self.recipe.eval_every == 0 or self.state.finished:
                best = self._evaluate(sum(losses) / len(losses))
                losses.clear()
                on_evaluate(best)

    def _plan_end(self) -> None:
        """In a run by minutes, start the decay when its share of the time is left."""
        state, recipe = self.state, self.recipe
        if state.decay_from is None and state.seconds >= 60 * recipe.minutes * (1 - recipe.decay):
            state.decay_from = state.step
            state.end = state.step + round(state.step * recipe.decay / (1 - recipe.decay))

    def _rate(self) -> float:
        """The learning rate of the next step."""
        state, rate = self.state, self.recipe.learning_rate * min(1.0, (self.state.step + 1) / (self.recipe.warmup + 1))
        if state.decay_from is None or state.end is None or state.step < state.decay_from:
            return rate
        return rate * (state.end - state.step) / (state.end - state.decay_from + 1)

    def _batches(self) -> Iterator[list[int]]:
        """Endless batches from the next step on; a function of the seed and the step."""
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

    def _forward(self, texts: Sequence[CachedText]) -> tuple[Tensor, Tensor, Targets, tuple[Tensor, Tensor] | None]:
        """Arguments of `draft_agreement`: normed states of the labelled rows, head, targets, the head's correction."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            hidden = self.module(VarlenTexts.of(texts, self._device)).to(self._dtype)
            correction = self.module.correction(hidden)
        ids, probabilities = (
            torch.cat(parts).to(self._device) for parts in zip(*(text.top_k for text in texts), strict=True)
        )
        return hidden, self._head, Targets.of(ids, probabilities, self.module.token_ids), correction

    def _step(self, batch: Sequence[int]) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        loss = self._backward(batch)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.state.step} is {loss}; lower learning_rate")
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _backward(self, batch: Sequence[int]) -> float:
        """Compute the gradients of the mean loss over the rows of a batch; return the loss."""
        texts = [self.texts[index] for index in own_share(batch)]
        total = self._head.new_zeros(1, dtype=torch.float32)
        if texts:
            hidden, head, targets, correction = self._forward(texts)
            share = len(hidden) / sum(map(self.texts.rows, batch))
            loss = share * draft_loss(hidden, head, targets, self._weights, correction)
            loss.backward()
            total += loss.detach()
        if PartialState().num_processes > 1:
            parameters = list(self.module.parameters())
            # the gradient is None in a process without texts
            grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
            total, *grads = reduce([total, *grads], "sum")
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
        return float(total)

    def _evaluate(self, loss: float) -> bool:
        """Evaluate the held-out texts; return whether the exit is the best so far."""
        state = self.state
        figures = {name: self.agreement(texts) for name, texts in self.held_out.items()}
        score = sum(one.tokens_per_round for one in figures.values()) / len(figures)
        state.history.append(
            {"step": state.step, "seconds": round(state.seconds, 1), "loss": loss, "rate": self._rate(),
             "held out": {name: one._asdict() for name, one in figures.items()}}
        )  # fmt: skip
        better = score > state.best
        if better:
            state.best, state.best_step = score, state.step
        elif sum(entry["step"] > state.best_step for entry in state.history) >= self.recipe.patience:
            state.stopped_early = True
        return better

    @torch.no_grad()
    def agreement(self, texts: CachedTexts) -> Agreement:
        """Measure how often the exit drafts the token of the model.

        Rounds can be simulated on the text itself: a draft layer sees the hidden states of every token, drafted or not,
        and a draft token counts only if those before it were right.
        """
        agrees: list[list[bool]] = []
        acceptance: list[float] = []
        for index in own_share(range(len(texts))):
            one = draft_agreement(*self._forward([texts[index]]))
            agrees.append(one.agrees.tolist())
            acceptance += one.acceptance.tolist()
        agrees, acceptance = gather_object(agrees), gather_object(acceptance)
        total = sum(map(len, agrees))
        positions, tokens_per_round = simulate_rounds(agrees, NUM_SPECULATIONS)
        return Agreement(sum(map(sum, agrees)) / total, positions, tokens_per_round, math.fsum(acceptance) / total)

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        parts = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save({"state": asdict(self.state), **parts}, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        saved = torch.load(path, map_location=self._device, weights_only=True)
        self.state = ExitTrainerState(**saved["state"])
        # Older checkpoints call the draft layers "blocks".
        weights = {re.sub(r"^blocks\.", "draft_layers.", name): weight for name, weight in saved["module"].items()}
        self.module.load_state_dict(weights)
        self._optimizer.load_state_dict(saved["optimizer"])
