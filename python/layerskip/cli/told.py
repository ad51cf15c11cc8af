"""A decoding told in texts: that of every new token, and those of every round's drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..decoding import RoundRecord
from ..decoding.text import SequenceText


@dataclass
class ToldRound:
    """A `RoundRecord` with the drafts' texts in the place of their tokens."""

    source: str
    exit_layer: int
    drafts: list[str]
    accepted: int
    emitted: int


@dataclass
class Told:
    """The texts of the new tokens, which together are the new text, and the rounds that gave them."""

    pieces: list[str] = field(default_factory=list)
    rounds: list[ToldRound] = field(default_factory=list)

    @classmethod
    def of(cls, tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], records: Sequence[RoundRecord]) -> Told:
        """Of one sequence: its prompt, its new tokens, and its rounds."""
        rounds, place = [], 1
        for record in records:
            before = [*prompt, *tokens[:place]]
            texts = pieces(tokenizer, before, record.drafts)
            rounds.append(ToldRound(record.source, record.exit_layer, texts, record.accepted, record.emitted))
            place += record.emitted
        return cls(pieces(tokenizer, prompt, tokens), rounds)


def pieces(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those ``before`` it; a character of several tokens belongs to the last."""
    text = SequenceText(tokenizer, skip_special_tokens=False)
    text.start_after(before)
    texts = [text.push(token) for token in tokens]
    if texts:
        texts[-1] += text.finish()
    return texts
