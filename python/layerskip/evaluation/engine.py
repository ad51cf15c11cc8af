"""A model as evaluations ask it: for continuations, one way or another, and for log-likelihoods after any layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels import rms_norm
from layerskip_kernels.formats import lookup

from ..cli.ways import AUTOREGRESSIVE, EARLY_EXIT, SELF_SPECULATIVE
from ..decoding import GenerationOutput, SelfSpeculativeDecoder
from ..decoding.detokenizer import SequenceText
from ..models import LayerSkipModel
from ..training.exit_analysis import DecoderDepths

STRATEGY = {AUTOREGRESSIVE: "autoregressive", EARLY_EXIT: "early_exit", SELF_SPECULATIVE: "self_speculative"}
_ROWS = 256  # of the head at once


@dataclass(frozen=True)
class Engine:
    """A decoder with its tokenizer, and the layer of its early exit.

    ``max_new_tokens`` are those of an answer, if not what each task says.
    """

    decoder: SelfSpeculativeDecoder
    tokenizer: Any
    exit_layer: int
    max_new_tokens: int | None = None

    def depth(self, way: str) -> int:
        """How many layers say what the next token is."""
        return self.exit_layer if way == EARLY_EXIT else self.decoder.model.num_layers

    def generate(self, ids: Tensor, way: str, new_tokens: int, stops: Sequence[str] = ()) -> GenerationOutput:
        """Continue a prompt [1, N] greedily, until a stop string is complete."""
        exit_layer = self.exit_layer if way == EARLY_EXIT else None
        return self.decoder.generate(
            ids,
            self.max_new_tokens or new_tokens,
            STRATEGY[way],
            exit_layer,
            tokenizer=self.tokenizer,
            stop_strings=stops or None,
        )

    def text(self, out: GenerationOutput, stops: Sequence[str] = ()) -> str:
        """What was written: whole characters, without special tokens, up to the first stop string."""
        new = out.new_tokens[0].tolist()
        return continuation(self.tokenizer, out.sequences[0].tolist()[: -len(new)], new, stops)


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], stops: Sequence[str]) -> str:
    """The text of tokens after a prompt, up to the first stop string."""
    text = SequenceText(tokenizer, stops)
    text.start_after(prompt)
    return "".join([*map(text.push, tokens), text.finish()])


@torch.no_grad()
def log_likelihoods(model: LayerSkipModel, ids: Tensor, depth: int, start: int = 1) -> tuple[Tensor, Tensor]:
    """What layers [0, depth) with the model's norm and head say of the tokens of a text.

    ln p(token) = logit(token) - log-sum-exp, the latter from `exit_head`, so that no logits are written.

    Parameters
    ----------
    model : LayerSkipModel
    ids : Tensor [N], int64
        N ≥ 2.
    depth : int
        L, or E of an early exit.
    start : int
        The first token that is asked about, at least 1: the first of all has nothing before it.

    Returns
    -------
    (Tensor [N - start], fp32, Tensor [N - start], bool)
        The tokens' log-likelihoods, natural, and whether each is the most probable one.
    """
    depths, head, labels = DecoderDepths(model), model.head, ids[start:]
    raw = depths.raw_states(ids[None, :-1], (depth,))[depth][0, start - 1 :]
    found, greedy = [], []
    for rows, tokens in zip(raw.split(_ROWS), labels.split(_ROWS), strict=True):
        out = head(rows)
        normed = rms_norm(rows, head.norm_weight, head.eps).float()
        weights = lookup(head.head_weight, tokens, model.decoder.hidden_size, torch.float32).float()
        found.append((normed * weights).sum(-1) - out.logsumexp)
        greedy.append(out.token == tokens)
    return torch.cat(found), torch.cat(greedy)
