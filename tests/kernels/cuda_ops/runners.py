"""The CUDA kernels, emulated on the CPU or on a GPU, called as the public ops are.

A test that takes the fixture ``ops`` runs on both: emulated in every suite, on a GPU with the mark ``gpu``. Tensors
come from the CPU and go back to it; what an op writes in place is written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.schemas import bind
from tests.cuda_emulation import library

from ..common import run
from .layers import WEIGHTS_PER_LAYER, EmulatedLayers, code_of, codes_of

HEAD_TILE, ARGMAX_LSE_WORDS = 16, 5  # of csrc/cuda/exit_head.h
ACCEPT_TILE, CANDIDATES_WORDS = 4096, 4  # of csrc/cuda/accept.h


def _void(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
    """Memory in which what a kernel forgets to write shows."""
    return torch.full(shape, float("nan") if like.is_floating_point else torch.iinfo(like).max, dtype=like)


class Emulated(EmulatedLayers):
    """The kernels under tests/cuda_emulation.

    Parameters
    ----------
    seed : int
        Of the order in which blocks and threads run.
    arch : {80, 90}
        The GPU that is emulated.
    """

    def __init__(self, seed: int = 0, arch: int = 90) -> None:
        self.seed, self.arch = seed, arch

    def call(self, file: str, entry: str, *args: Any, writes: list[Tensor]) -> None:
        library(file).call(entry, *args, writes=writes, seed=self.seed, arch=self.arch)

    def exit_head(
        self, hidden: Tensor, norm: Tensor, weight: Tensor, eps: float, token_map: Tensor | None = None,
        scale: Tensor | None = None, temperature: Tensor | None = None, seed: Tensor | None = None,
        offset: Tensor | None = None, logits: Tensor | None = None,
    ) -> lk.ExitOutput:  # fmt: skip
        (rows, width), vocab_size = hidden.shape, len(weight)
        partial = _void(rows, -(-vocab_size // HEAD_TILE), ARGMAX_LSE_WORDS)
        out = (_void(rows, like=torch.int64), _void(rows), _void(rows))
        pitch = 0 if logits is None else logits.stride(0)
        self.call(
            "exit_head", "exit_head", hidden, hidden.stride(0), norm, weight, float(eps), token_map, scale, temperature,
            seed, offset, logits, pitch, partial, *out, rows, vocab_size, width, code_of(weight, width), hidden.dtype,
            writes=[partial, *out] + ([] if logits is None else [logits]),
        )  # fmt: skip
        return lk.ExitOutput(*out)

    def accept_greedy(self, draft: Tensor, target: Tensor, seq_lens: Tensor) -> lk.Acceptance:
        out = (_void(len(draft), like=torch.int64), _void(len(draft), like=torch.int64))
        self.call("accept", "accept_greedy", draft, target, seq_lens, *out, *draft.shape, writes=[seq_lens, *out])
        return lk.Acceptance(*out)

    def accept_sampled(
        self, draft: Tensor, draft_logits: Tensor, target_logits: Tensor, seq_lens: Tensor, temperature: Tensor,
        seed: Tensor, token_map: Tensor | None = None,
    ) -> lk.Acceptance:  # fmt: skip
        batch, num_speculations = draft.shape
        draft_vocab_size, vocab_size = draft_logits.shape[-1], target_logits.shape[-1]
        tiles = -(-max(draft_vocab_size, vocab_size) // ACCEPT_TILE)
        out = (_void(batch, like=torch.int64), _void(batch, like=torch.int64))
        rows, candidates = (
            _void(batch, 2 * num_speculations + 1, tiles, ARGMAX_LSE_WORDS),
            _void(batch, tiles, CANDIDATES_WORDS),
        )
        inverse = None if token_map is None else _void(vocab_size, like=torch.int32)
        self.call(
            "accept", "accept_sampled", draft, draft_logits, target_logits, seq_lens, temperature, seed,
            token_map, *out, rows, candidates, inverse, batch, num_speculations, draft_vocab_size, vocab_size,
            writes=[seq_lens, *out, rows, candidates] + ([] if inverse is None else [inverse]),
        )  # fmt: skip
        return lk.Acceptance(*out)

    def draft(self, *args: Any) -> lk.Draft:
        a = bind("draft", *args)
        batch, num_speculations, draft_vocab_size = len(a.token), a.num_speculations, len(a.head_weight)
        model = _Model(a.embedding, a.norm_weight, a.weights, a.k_cache, a.v_cache, a.exit_layer, a.num_draft_layers)
        sizes = model.sizes(batch, num_speculations, a.extend, a.head_weight, a.head_weight, a.exit_layer)
        out, buffers = model.draft_buffers(batch, num_speculations, a.extend, draft_vocab_size)
        memory = self._round_scratch(sizes, 1, a.norm_weight.dtype)
        pitches = (0, 0) if a.logits is None else (a.logits.stride(0), a.logits.stride(1))
        self.call(
            "speculative_round", "draft", a.token, a.embedding, model.weights, model.formats, model.caches, a.cos,
            a.sin, a.seq_lens, a.slots, a.norm_weight, a.head_weight, a.token_map, a.scale, a.temperature, a.seed,
            a.logits, *pitches, *out, *buffers, memory, sizes, float(a.eps), float(a.draft_threshold),
            a.norm_weight.dtype,
            writes=[a.k_cache, a.v_cache, *out, *buffers, memory] + ([] if a.logits is None else [a.logits]),
        )  # fmt: skip
        return lk.Draft(*out)

    def speculative_round(self, *args: Any) -> lk.Round:
        a = bind("speculative_round", *args)
        draft_norm = a.norm_weight if a.draft_norm_weight is None else a.draft_norm_weight
        draft_head = a.head_weight if a.draft_head_weight is None else a.draft_head_weight
        batch, num_speculations, dtype = len(a.token), a.num_speculations, a.norm_weight.dtype
        draft_vocab_size, vocab_size = len(draft_head), len(a.head_weight)
        num_layers = a.k_cache.shape[0] - a.num_draft_layers
        model = _Model(a.embedding, a.norm_weight, a.weights, a.k_cache, a.v_cache, num_layers, a.num_draft_layers)
        sizes = model.sizes(batch, num_speculations, True, draft_head, a.head_weight, a.exit_layer)
        drafted, buffers = model.draft_buffers(batch, num_speculations, True, max(draft_vocab_size, vocab_size))
        memory = [self._round_scratch(sizes, rows, dtype) for rows in (1, num_speculations + 1)]
        verified = [_void(batch * (num_speculations + 1), like=torch.int64), _void(2, batch * (num_speculations + 1))]
        out = [_void(batch, like=torch.int64), _void(batch, like=torch.int64)]
        logits: list[Tensor | None] = [None, None]
        scratch: list[Tensor | None] = [None, None, None]
        if a.temperature is not None:
            tiles = -(-max(draft_vocab_size, vocab_size) // ACCEPT_TILE)
            logits = [_void(batch, num_speculations, draft_vocab_size), _void(batch, num_speculations + 1, vocab_size)]
            rows = 2 * num_speculations + 1
            scratch = [_void(batch, rows, tiles, ARGMAX_LSE_WORDS), _void(batch, tiles, CANDIDATES_WORDS)]
            scratch.append(None if a.draft_token_map is None else _void(vocab_size, like=torch.int32))
        written = [a.k_cache, a.v_cache, a.seq_lens, *drafted, *buffers, *memory, *verified, *out, *logits, *scratch]
        self.call(
            "speculative_round", "speculative_round", a.token, a.embedding, model.weights, model.formats, model.caches,
            a.cos, a.sin, a.seq_lens, a.slots, a.norm_weight, a.head_weight, draft_norm, draft_head, a.draft_token_map,
            a.draft_head_scale, a.temperature, a.seed, *logits, *drafted, *buffers, *memory, *verified, *out, *scratch,
            sizes, float(a.eps), float(a.draft_threshold), dtype, writes=[one for one in written if one is not None],
        )  # fmt: skip
        return lk.Round(drafted[0], *out, drafted[2])

    def _round_scratch(self, sizes: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        bytes_ = torch.zeros(1, dtype=torch.int64)
        self.call("speculative_round", "forward_bytes", bytes_, sizes, rows, dtype, writes=[bytes_])
        return _void(int(bytes_), like=torch.uint8)


class _Model:
    """Layers [0, ``layers``) and the draft layers as the entries take them."""

    def __init__(
        self,
        embedding: Tensor,
        norm_weight: Tensor,
        weights: Sequence[Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
        layers: int,
        num_draft_layers: int,
    ) -> None:
        each = len(weights) // (layers + num_draft_layers)
        optional = [one if one.numel() else None for one in weights]
        self.embedding, self.norm_weight = embedding, norm_weight
        self.layers, self.num_draft_layers = layers, num_draft_layers
        self.formats = codes_of(weights, each, len(norm_weight))
        self.first = dict(zip(lk.LayerWeights._fields, weights[:each], strict=False))
        self.weights: list[Tensor | None] = []
        for first in range(0, len(weights), each):
            self.weights += [*optional[first : first + each], *[None] * (WEIGHTS_PER_LAYER - each)]
        cached = [*range(layers), *range(len(k_cache) - num_draft_layers, len(k_cache))]
        self.caches = [cache[layer] for layer in cached for cache in (k_cache, v_cache)]
        self.cached = k_cache.shape

    def sizes(
        self, batch: int, num_speculations: int, extend: bool, draft_head: Tensor, head: Tensor, exit_layer: int
    ) -> Tensor:
        """In the order of `Sizes` in tests/cuda_emulation/ops/speculative_round.cpp."""
        _, num_slots, num_kv_heads, capacity, head_dim = self.cached
        embedded, hidden_size = len(self.embedding), len(self.norm_weight)
        num_heads, intermediate_size = len(self.first["q"]) // head_dim, len(self.first["gate"])
        return torch.tensor(
            [batch, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, capacity, num_slots,
             num_speculations, extend, embedded, len(draft_head), len(head), exit_layer, self.layers,
             self.num_draft_layers, *(code_of(one, hidden_size) for one in (self.embedding, draft_head, head))]
        )  # fmt: skip

    def draft_buffers(
        self, batch: int, num_speculations: int, extend: bool, vocab_size: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
        """Tokens, states and probability; the scratch of a draft, of K + 1 rows where it is verified."""
        width, dtype = len(self.norm_weight), self.norm_weight.dtype
        states = _void(batch, num_speculations + extend, width, like=dtype)
        partial = _void(batch * (num_speculations + 1), -(-vocab_size // HEAD_TILE), ARGMAX_LSE_WORDS)
        out = (_void(batch, num_speculations, like=torch.int64), states, _void(batch, num_speculations))
        return out, [_void(batch, width, like=dtype), partial]


def _to_gpu(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_to_gpu(one) for one in arg]
    return arg.cuda() if isinstance(arg, Tensor) else arg


class GPU:
    """The ops of the library on a GPU, by its backend "cuda"."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        schema = getattr(torch.ops.layerskip, op).default._schema

        def call(*args: Any) -> Any:
            moved = [_to_gpu(arg) for arg in args]
            with lk.use_backend("cuda"):
                out = run(op, *moved)
            for arg, there, known in zip(args, moved, schema.arguments, strict=False):
                if isinstance(arg, Tensor) and known.alias_info is not None and known.alias_info.is_write:
                    arg.copy_(there)
            return type(out)(*(one.cpu() for one in out)) if isinstance(out, tuple) else out.cpu()

        return call


Ops = Emulated | GPU
