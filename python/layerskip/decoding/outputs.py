"""Results of decoding: the output of a call, the updates of a session, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .detokenizer import text_after


class Streamer(Protocol):
    """A streamer as in transformers: ``put`` gets the prompt [1, N] first, then each group of new tokens [n]."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class DraftCount(NamedTuple):
    """Draft tokens of a source: verified and accepted."""

    drafted: int
    accepted: int


class RoundRecord(NamedTuple):
    """One round of one sequence. The first new token follows the prompt; each later one is in exactly one round.

    Attributes
    ----------
    source : str
        Origin of the drafts: "exit", "ngram", or the name of a `DraftSource`; "none" for autoregressive decoding.
    exit_layer : int or None
        The layer that drafted; with the strategy "early_exit", the layer that emitted the token. None for lookup drafts
        and for autoregressive decoding.
    drafts : tuple of int
        The draft tokens that were verified.
    accepted : int
        Number of leading drafts that were emitted.
    emitted : int
        New tokens of the round: the accepted drafts and one token of the full model, unless the sequence ended before.
    """

    source: str
    exit_layer: int | None
    drafts: tuple[int, ...]
    accepted: int
    emitted: int

    @property
    def decided(self) -> int:
        """Number of drafts up to the first rejected one; the fate of later ones is unknown."""
        return min(self.emitted, len(self.drafts))


@dataclass(frozen=True)
class Stats:
    """Counts and times of one sequence, or of a batch.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
    records : tuple of RoundRecord
        All rounds, sequence by sequence.
    seconds : float
        Wall time, prompt included.
    time_to_first_token : float
        Seconds until the first token; for a batch, until every sequence has one.
    sequences : int
        Number of sequences that the counts are sums of.
    reused : int
        Prompt tokens whose keys and values were in the cache already.
    """

    prompt_tokens: int
    new_tokens: int
    records: tuple[RoundRecord, ...]
    seconds: float
    time_to_first_token: float
    sequences: int = 1
    reused: int = 0

    @classmethod
    def of_batch(cls, rows: Sequence[Stats]) -> Stats:
        """Sum over sequences that were decoded together; times are those of the slowest."""
        return cls(
            prompt_tokens=sum(row.prompt_tokens for row in rows),
            new_tokens=sum(row.new_tokens for row in rows),
            records=tuple(record for row in rows for record in row.records),
            seconds=max(row.seconds for row in rows),
            time_to_first_token=max(row.time_to_first_token for row in rows),
            sequences=len(rows),
            reused=sum(row.reused for row in rows),
        )

    @property
    def rounds(self) -> int:
        """Passes through the later layers after the prompt, summed over sequences."""
        return len(self.records)

    @property
    def drafted(self) -> int:
        """Draft tokens that were verified."""
        return sum(len(record.drafts) for record in self.records)

    @property
    def accepted(self) -> int:
        """Draft tokens that were emitted."""
        return sum(record.accepted for record in self.records)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted; 0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def by_source(self) -> dict[str, DraftCount]:
        """Draft tokens by source."""
        return {
            name: DraftCount(sum(len(one.drafts) for one in records), sum(one.accepted for one in records))
            for name, records in self._drafting_rounds().items()
        }

    @property
    def by_position(self) -> dict[str, tuple[DraftCount, ...]]:
        """Draft tokens by source and position in the round; a draft counts if all before it were accepted."""
        return {
            name: tuple(
                DraftCount(sum(one.decided > place for one in records), sum(one.accepted > place for one in records))
                for place in range(max(one.decided for one in records))
            )
            for name, records in self._drafting_rounds().items()
        }

    def _drafting_rounds(self) -> dict[str, list[RoundRecord]]:
        rounds: dict[str, list[RoundRecord]] = {}
        for record in self.records:
            if record.drafts:
                rounds.setdefault(record.source, []).append(record)
        return rounds

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the wall time, prompt included."""
        return self.new_tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first over the time after it; 0 without any."""
        after = self.seconds - self.time_to_first_token
        return (self.new_tokens - self.sequences) / after if self.new_tokens > self.sequences else 0.0


@dataclass(frozen=True)
class GenerationOutput:
    """Tokens and statistics of a call.

    Attributes
    ----------
    sequences : Tensor [B, max(N + new)], int64
        Prompt and new tokens, padded on the right.
    new_tokens : Tensor [B, max(new)], int64
        New tokens alone, padded on the right.
    drafted : Tensor [B, max(new)], bool
        True for accepted draft tokens, False for tokens of the full model.
    per_sequence : tuple of Stats
    reasons : tuple of str
        Why each sequence ended: "eos", "stop", "length", "cancelled", "deadline" or "error".
    tokenizer : transformers.PreTrainedTokenizerBase or None
        Decodes `text`; the decoder's, or the one that the call was given.
    """

    sequences: Tensor
    new_tokens: Tensor
    drafted: Tensor
    per_sequence: tuple[Stats, ...]
    reasons: tuple[str, ...]
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str | list[str]:
        """Text of the new tokens, as `SelfSpeculativeDecoder.stream` yields it; of several sequences a list.

        Special tokens are left out; a stop string that ended the sequence is not.

        Raises
        ------
        ValueError
            Without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "the text needs a tokenizer: set decoder.tokenizer, which from_pretrained does, or give tokenizer="
            )
        texts = []
        for tokens, stats in zip(self.sequences.tolist(), self.per_sequence, strict=True):
            end = stats.prompt_tokens + stats.new_tokens
            texts.append(text_after(self.tokenizer, tokens[: stats.prompt_tokens], tokens[stats.prompt_tokens : end]))
        return texts[0] if len(texts) == 1 else texts

    @property
    def stats(self) -> Stats:
        """Statistics of the sequence, or sums over the batch."""
        return self.per_sequence[0] if len(self.per_sequence) == 1 else Stats.of_batch(self.per_sequence)

    @classmethod
    def of_batch(cls, outputs: Sequence[GenerationOutput], pad: int) -> GenerationOutput:
        """Join the outputs of single sequences, padded with the token ``pad``."""
        if len(outputs) == 1:
            return outputs[0]
        join = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return cls(
            join([out.sequences[0] for out in outputs], padding_value=pad),
            join([out.new_tokens[0] for out in outputs], padding_value=pad),
            join([out.drafted[0] for out in outputs], padding_value=False),
            tuple(row for out in outputs for row in out.per_sequence),
            tuple(reason for out in outputs for reason in out.reasons),
            outputs[0].tokenizer,
        )


@dataclass(frozen=True)
class Update:
    """Result of one step for one request.

    Attributes
    ----------
    request_id : int
    tokens : list of int
        New tokens. They are final.
    drafted : list of bool
        True for accepted draft tokens, False for tokens of the full model.
    reason : {"eos", "stop", "length", "cancelled", "deadline", "error"} or None
        Why the request ended: an EOS token, its ``should_stop``, ``max_new_tokens``, `Session.cancel`, its deadline, or
        an exception. None while it runs.
    output : GenerationOutput or None
        The whole sequence [1, N + new], once it ended. The session does not keep it.
    error : Exception or None
        Exception of a hook, or FloatingPointError for logits that are not finite. Other requests continue.
    """

    request_id: int
    tokens: list[int]
    drafted: list[bool]
    reason: str | None = None
    output: GenerationOutput | None = None
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last update."""
        return self.reason is not None
