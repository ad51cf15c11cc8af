"""What decoding returns: the output of a call, the updates of a session, and what a streamer is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Streamer(Protocol):
    """A streamer as in transformers: it is given the prompt first, then each group of new tokens."""

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, N], or new tokens [n]."""

    def end(self) -> None:
        """Take note that no more tokens follow."""


class DraftCount(NamedTuple):
    """How many tokens a source drafted, and how many of them were emitted."""

    drafted: int
    accepted: int


class RoundRecord(NamedTuple):
    """What one round did for one sequence.

    The tokens of all rounds, in order, are the new tokens after the first one, which the prompt gives.

    Attributes
    ----------
    source : str
        What drafts: "exit", "ngram", or the name of a `DraftSource`.
    exit_layer : int
        The layer after which drafts are made, 0 where they were looked up. Without speculation, the layer that the
        token comes from.
    drafts : tuple of int
        The tokens that were drafted and verified; none, where nothing was drafted.
    accepted : int
        How many of them were emitted, from the first on.
    emitted : int
        The tokens of the round: those, and the full model's own one, unless the sequence ended before it.
    """

    source: str
    exit_layer: int
    drafts: tuple[int, ...]
    accepted: int
    emitted: int

    @property
    def decided(self) -> int:
        """How many drafts were accepted, or were the first one that was not; those after it came to nothing."""
        return min(self.emitted, len(self.drafts))


@dataclass(frozen=True)
class Stats:
    """Counts and times of one sequence, or of a batch.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
    records : tuple of RoundRecord
        What each round did; of a batch, those of the first sequence, then those of the second, ….
    seconds : float
        Wall time, prompt included.
    time_to_first_token : float
        Seconds until the prompt was read and the first token known; of a batch, until every sequence had its first.
    sequences : int
        How many sequences the counts are sums of.
    reused : int
        Tokens of the prompt that were not read, because the cache held their keys and values.
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
        """The sums over sequences that were decoded together; times are those of the slowest."""
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
        """Passes through the later layers after the prompt; of a batch, summed over its sequences."""
        return len(self.records)

    @property
    def accepted_per_round(self) -> tuple[int, ...]:
        """Draft tokens that each round emitted. A round runs the later layers once, and emits one token more."""
        return tuple(record.accepted for record in self.records)

    @property
    def drafted(self) -> int:
        """Draft tokens that were verified."""
        return sum(len(record.drafts) for record in self.records)

    @property
    def accepted(self) -> int:
        """Draft tokens that were emitted."""
        return sum(record.accepted for record in self.records)

    @property
    def by_source(self) -> dict[str, DraftCount]:
        """The drafts by what made them."""
        return {
            name: DraftCount(sum(len(one.drafts) for one in records), sum(one.accepted for one in records))
            for name, records in self._drafting().items()
        }

    @property
    def by_position(self) -> dict[str, tuple[DraftCount, ...]]:
        """The same by source and by place in the round.

        Entry i counts the rounds whose first i drafts were accepted and that had another one, and those of them in
        which that was accepted, too.
        """
        return {
            name: tuple(
                DraftCount(sum(one.decided > place for one in records), sum(one.accepted > place for one in records))
                for place in range(max(one.decided for one in records))
            )
            for name, records in self._drafting().items()
        }

    def _drafting(self) -> dict[str, list[RoundRecord]]:
        """The rounds that drafted, by source."""
        rounds: dict[str, list[RoundRecord]] = {}
        for record in self.records:
            if record.drafts:
                rounds.setdefault(record.source, []).append(record)
        return rounds

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the wall time, prompt included."""
        return self.new_tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """The tokens after the first ones over the time after them; 0 where there were no others."""
        after = self.seconds - self.time_to_first_token
        return (self.new_tokens - self.sequences) / after if self.new_tokens > self.sequences else 0.0


@dataclass(frozen=True)
class GenerationOutput:
    """The tokens of a call, and how they came about.

    Attributes
    ----------
    sequences : Tensor [B, max(N + new)], int64
        Prompt and new tokens of each sequence, padded on the right.
    new_tokens : Tensor [B, max(new)], int64
        The new tokens alone, padded on the right.
    drafted : Tensor [B, max(new)], bool
        Whether a new token was drafted by the early layers (and verified), or chosen by the full model itself.
    per_sequence : tuple of Stats
        Of each sequence.
    reasons : tuple of str
        Why each sequence ended: "eos", "stop", "length", "cancelled" or "error".
    """

    sequences: Tensor
    new_tokens: Tensor
    drafted: Tensor
    per_sequence: tuple[Stats, ...]
    reasons: tuple[str, ...]

    @property
    def stats(self) -> Stats:
        """The statistics of the call: those of its sequence, or the sums of a batch."""
        return self.per_sequence[0] if len(self.per_sequence) == 1 else Stats.of_batch(self.per_sequence)

    @classmethod
    def of_batch(cls, outputs: Sequence[GenerationOutput], pad: int) -> GenerationOutput:
        """One output of those of many sequences, padded with the token ``pad``."""
        if len(outputs) == 1:
            return outputs[0]
        return cls(
            _padded([out.sequences[0] for out in outputs], pad),
            _padded([out.new_tokens[0] for out in outputs], pad),
            _padded([out.drafted[0] for out in outputs], False),
            tuple(row for out in outputs for row in out.per_sequence),
            tuple(reason for out in outputs for reason in out.reasons),
        )


@dataclass(frozen=True)
class Update:
    """What one step did for one request.

    Attributes
    ----------
    request_id : int
    tokens : list of int
        New tokens. They are final.
    drafted : list of bool
        Whether each of them was drafted by the early layers, or chosen by the full model itself.
    reason : {"eos", "stop", "length", "cancelled", "error"} or None
        Why the request ended: an EOS token, its ``should_stop``, ``max_new_tokens``, `Session.cancel`, or an
        exception; None while it goes on.
    output : GenerationOutput or None
        The whole sequence [1, N + new], once it ended. The session does not keep it.
    error : Exception or None
        What a hook raised, or FloatingPointError for logits that are not finite. Other requests go on.
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


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
