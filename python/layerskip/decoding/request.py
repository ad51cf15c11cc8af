"""A request: its options, its tokens, and its progress from prefill to the last round."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..devices import to_device
from ..models import LayerSkipModel
from . import validation
from .adaptive import AcceptanceRates
from .draft_sources import AUTO, EXIT, DraftSource, Lookup, NgramSource, source_of
from .outputs import GenerationOutput, RoundRecord, Stats
from .sampling import History, LogitsProcessor, SamplingParams

StopRule = Callable[[list[int]], bool]
"""(all new tokens so far) -> whether the sequence ends with the last of them."""

Clock = Callable[[], float]
"""() -> seconds."""

Prompt = str | Tensor | np.ndarray | Mapping[str, Any] | Sequence[int]
"""A text, tokens, or a tokenizer's output; `validation.prompts` checks it."""

Prompts = Prompt | Sequence[Prompt]


FIXED_SPECULATIONS = 4
"""K of a fixed exit layer, by default."""
_JUDGED, _NEAR_ZERO = 64, 0.1  # draft tokens, of which fewer than this share are accepted


@dataclass(frozen=True)
class RequestOptions:
    """How a request drafts, and what ends it; the arguments of `Session.add` of the same names."""

    exit_layer: int | str
    num_speculations: int | str
    draft_threshold: float
    draft_source: str | DraftSource
    eos_token_id: int | Sequence[int] | None
    strategy: str

    @property
    def speculative(self) -> bool:
        return self.strategy == "self_speculative"

    @property
    def uses_exit(self) -> bool:
        """Whether an exit of the model may draft."""
        return self.speculative and self.draft_source in (EXIT, AUTO)

    @property
    def adaptive(self) -> bool:
        """Whether the controller has anything to choose."""
        if not self.speculative or self.draft_source == AUTO:
            return self.speculative
        return self.num_speculations == "auto" or (self.uses_exit and self.exit_layer == "auto")

    def hint(self, stats: Stats) -> None:
        """Warn, once a process, if a fixed exit drafts almost only rejected tokens."""
        rejected = stats.drafted >= _JUDGED and stats.acceptance_rate < _NEAR_ZERO
        if rejected and self.uses_exit and not self.adaptive:
            warnings.warn(
                f"fewer than {_NEAR_ZERO:.0%} of the draft tokens of exit layer {self.exit_layer} were accepted, so "
                'decoding is slower than without drafts: leave exit_layer out (or give "auto"), or train an exit '
                "beside the model (layerskip train-exit)",
                stacklevel=2,
            )

    def new_lookup(self, prompt_tokens: list[int], vocab_size: int) -> Lookup | None:
        if not self.speculative or self.draft_source == EXIT:
            return None
        source = self.draft_source if isinstance(self.draft_source, DraftSource) else NgramSource()
        return Lookup(source.new(), prompt_tokens, vocab_size)


@dataclass(frozen=True)
class RequestDefaults:
    """Defaults for the options of a decoder's requests; `complete` replaces None."""

    exit_layer: int | str | None = None
    num_speculations: int | str | None = None
    draft_threshold: float = 0.0
    draft_source: str | DraftSource | None = None
    eos_token_id: int | Sequence[int] | None = None
    strategy: str = "self_speculative"

    def complete(self) -> RequestOptions:
        """Replace None by "auto"; if only E or K is a number, an exit drafts, and K is 4 unless it is given."""
        exit_layer: int | str = "auto" if self.exit_layer is None else self.exit_layer
        num_speculations = self.num_speculations
        if num_speculations is None:
            num_speculations = "auto" if exit_layer == "auto" else FIXED_SPECULATIONS
        source = self.draft_source
        if source is None:
            source = AUTO if exit_layer == num_speculations == "auto" else EXIT
        return RequestOptions(
            exit_layer, num_speculations, self.draft_threshold, source_of(source), self.eos_token_id, self.strategy
        )

    def updated(
        self, model: LayerSkipModel, max_speculations: int, repeatable: bool = False, **given: Any
    ) -> RequestOptions:
        """Return the options of a request with the values ``given``, of which None keeps the default; checked.

        "auto" depends on clocks, so a request whose tokens must be ``repeatable`` drafts only if E, K or the source is
        given.
        """
        own = replace(self, **{name: value for name, value in given.items() if value is not None})
        options = own.complete()
        validation.strategy(options.strategy)
        fixed = (own.exit_layer, own.num_speculations, own.draft_source) != (None, None, None)
        if repeatable and options.speculative and not fixed:
            options = replace(options, strategy="autoregressive")
        if options.exit_layer == "auto" and model.exit_layer is not None:
            options = replace(options, exit_layer=model.exit_layer)
        exit_layer = validation.exit_layer_or_auto(options.exit_layer, model.num_layers)
        validation.num_speculations_or_auto(options.num_speculations, max_speculations)
        validation.real("draft_threshold", options.draft_threshold, 0.0, 1.0)
        if options.strategy == "early_exit" and exit_layer is None:
            raise ValueError(f"exit_layer must be an int for the strategy early_exit, got {options.exit_layer!r}")
        if not options.uses_exit:
            return replace(options, draft_threshold=0.0)
        if model.exit_layer is not None:
            validation.exit_layer_of_exit(options.exit_layer, model.exit_layer)
        return options


class DraftKind(Enum):
    """Origin of the draft tokens of a round."""

    EXIT = "an exit of the model"
    LOOKUP = "lookup, for all sequences"
    MIXED = "an exit for some sequences, lookup for others"


class RoundKind(NamedTuple):
    """What requests must have in common to share a round.

    Greedy requests share rounds whatever K they ask for, because more drafts change no greedy token: here their K is 0.
    For sampled requests K decides which noise a token is drawn with.
    """

    speculative: bool
    num_layers: int  # layers that emit tokens: E with the strategy "early_exit", else L
    exit_layer: int | None = None  # None if drafts come from lookup only; such requests may join any speculative round
    num_speculations: int = 0
    draft_threshold: float = 0.0
    processed: bool = False  # whether logits are written and processed


class _Round(NamedTuple):
    """The tokens of a round, drafts first; ``record`` is None for the token that follows the prompt."""

    start: int  # number of new tokens before it
    tokens: tuple[int, ...]
    fault: str | None  # error message for the last token
    record: RoundRecord | None


@dataclass(eq=False)
class Request:
    """A request of a session: its options, then its progress.

    An interrupt cannot split a change of state, because each is one assignment: a round's tokens appear all at once,
    and a new token that ends the request ends it where it is appended. `reason` and the tokens that are still to emit
    are derived from these.
    """

    id: int
    model: LayerSkipModel
    options: RequestOptions
    prompt_ids: Tensor  # [1, N], int64
    max_new_tokens: int
    sampling: SamplingParams
    seed: int
    acceptance: AcceptanceRates
    stop_tokens: frozenset[int] = frozenset()
    should_stop: StopRule | None = None
    logits_processor: LogitsProcessor | None = None
    keep: bool = False  # whether its slot is retained when it has ended
    continue_from: int | None = None  # id of the retained request whose slot it takes over
    clock: Clock = time.perf_counter
    tokenizer: Any = None  # decodes `GenerationOutput.text`
    priority: int = 0
    deadline: float | None = None  # seconds after it was added

    new_tokens: list[int] = field(default_factory=list, init=False)
    ended_by: str | Exception | None = field(default=None, init=False)  # "cancelled", "deadline", "removed", an error
    slot: int = field(default=-1, init=False)  # row of the KV cache, once it has one
    last_used: int = field(default=0, init=False)  # number of the slot's last use
    num_prefilled: int = field(default=0, init=False)  # prompt tokens in the cache
    num_reused: int = field(default=0, init=False)  # of these, those that were there before
    last_hidden: Tensor | None = field(default=None, init=False)  # state [1, D] of the last prompt token
    history: History | None = field(default=None, init=False)
    lookup_drafts: list[int] | None = field(default=None, init=False)  # of the next round; None if an exit drafts

    def __post_init__(self) -> None:
        options, model = self.options, self.model
        self.prompt_tokens: list[int] = self.prompt_ids[0].tolist()
        self.exit_layer = None if options.exit_layer == "auto" else int(options.exit_layer)
        self.num_speculations = 0 if options.num_speculations == "auto" else int(options.num_speculations)
        self.num_layers = model.num_layers
        if options.strategy == "early_exit" and self.exit_layer is not None:
            self.num_layers = self.exit_layer
        self.lookup = options.new_lookup(self.prompt_tokens, model.vocab_size)
        self.num_draft_cached = len(self.prompt_tokens)  # tokens that the draft layers of an exit have read
        self._rounds: list[_Round] = []  # the first one is the token that follows the prompt
        self._drafted: list[bool] = []  # whether each new token was a draft; one more while a token is appended
        self._stop_length = 0  # number of new tokens with which its rule ends it
        self._started = self._first_token_at = self._last_at = self.clock()

    @property
    def reason(self) -> str | None:
        """Why it ended, see `Update`, or "removed"; None while it waits or runs."""
        if self.ended_by is not None:
            return self.ended_by if isinstance(self.ended_by, str) else "error"
        if not self.new_tokens:
            return None
        if self.new_tokens[-1] in self.stop_tokens:
            return "eos"
        if len(self.new_tokens) == self._stop_length:
            return "stop"
        return None if self.remaining > 0 else "length"

    @property
    def started(self) -> bool:
        """Whether the token that follows the prompt is known."""
        return bool(self._rounds)

    @property
    def running(self) -> bool:
        return self.started and self.reason is None

    @property
    def overdue(self) -> bool:
        return self.deadline is not None and self.clock() - self._started >= self.deadline

    @property
    def retained(self) -> bool:
        """Whether it has ended and its slot is kept."""
        return self.keep and self.started and self.reason not in (None, "error", "removed")

    @property
    def all_tokens(self) -> list[int]:
        return self.prompt_tokens + self.new_tokens

    @property
    def all_ids(self) -> Tensor:
        """All tokens [1, N + new], int64."""
        return torch.cat([self.prompt_ids, self._new_ids], 1)

    @property
    def _new_ids(self) -> Tensor:
        return to_device(torch.tensor([self.new_tokens], dtype=torch.int64), self.prompt_ids.device)

    @property
    def position(self) -> int:
        """Position of the last token. The cache holds all positions before it."""
        return len(self.prompt_tokens) + len(self.new_tokens) - 1

    @property
    def remaining(self) -> int:
        """New tokens that may still be emitted."""
        return self.max_new_tokens - len(self.new_tokens)

    # Prefill

    @property
    def num_unread(self) -> int:
        """Prompt tokens that are not in the cache."""
        return len(self.prompt_tokens) - self.num_prefilled

    @property
    def num_prefill_layers(self) -> int:
        """Layers that read the prompt: those that emit tokens, and the draft layers of an exit that may draft."""
        return self.num_layers + (self.model.decoder.num_draft_layers if self.options.uses_exit else 0)

    def cached_tokens(self, with_decoded: bool) -> list[int]:
        """Tokens whose keys and values are in its slot: of the prompt, and decoded ones if they count."""
        if self.num_unread:
            return self.prompt_tokens[: self.num_prefilled]
        return self.prompt_tokens + self.new_tokens[:-1] if with_decoded else self.prompt_tokens

    # The next round

    @property
    def processed(self) -> bool:
        """Whether its logits are written and processed. A threshold on sampled drafts needs that, too."""
        if self.logits_processor is not None or self.sampling.processes:
            return True
        return self.options.draft_threshold > 0 and not self.sampling.greedy

    @property
    def kind(self) -> RoundKind:
        options = self.options
        if not options.uses_exit:
            return RoundKind(options.speculative, self.num_layers, processed=self.processed)
        num_speculations = 0 if self.sampling.greedy else self.num_speculations
        threshold = options.draft_threshold
        return RoundKind(True, self.num_layers, self.exit_layer, num_speculations, threshold, self.processed)

    @property
    def useful_drafts(self) -> int:
        """Drafts of an exit that the next round can emit, beside one token of the full model."""
        return min(self.num_speculations, self.remaining - 1)

    @property
    def draft_lag(self) -> int:
        """Tokens that the draft layers of an exit have to read before they can draft."""
        return max(0, self.position - self.num_draft_cached)

    def look_up(self, limit: int) -> None:
        """Look up at most ``limit`` drafts for the next round."""
        if self.lookup is not None:
            self.lookup.propose(self.new_tokens, min(limit, self.remaining - 1))
            self.lookup_drafts = list(self.lookup.proposal.tokens)

    # Emission

    def emit(self, token: int, fault: str | None = None) -> None:
        """Emit the token that follows the prompt; raises as `emit_pending` does."""
        self._rounds.append(_Round(0, (token,), fault, None))
        self.emit_pending()

    def emit_round(
        self, drafts: Sequence[int], accepted: int, token: int, exit_layer: int | None, fault: str | None = None
    ) -> None:
        """Emit the accepted drafts of a round, then the full model's own ``token``; raises as `emit_pending` does."""
        source: tuple[str, int | None] = (EXIT, exit_layer)
        if self.options.strategy == "autoregressive":
            source = ("none", None)
        elif self.lookup is not None and self.lookup_drafts is not None:
            source = (self.lookup.proposal.source, None)
        # Other sequences of the batch may need more drafts than this one.
        record = RoundRecord(*source, tuple(drafts[: self.remaining]), 0, 0)
        self._rounds.append(_Round(len(self.new_tokens), (*drafts[:accepted], token), fault, record))
        self.emit_pending()

    def emit_pending(self) -> None:
        """Emit the tokens of the last round that are not emitted yet, up to the sequence's end.

        Raises
        ------
        FloatingPointError
            With the fault of the round's last token, unless the sequence ends before it.
        """
        start, tokens, fault, _ = self._rounds[-1]
        for token in tokens[len(self.new_tokens) - start :]:
            if self.reason is not None:
                return
            self._last_at = now = self.clock()
            if start == 0:
                self._first_token_at = now
            count = len(self.new_tokens) + 1
            drafted = count - start < len(tokens)
            if not drafted and fault is not None:
                raise FloatingPointError(fault)
            # The rule is asked before the token is appended: if it is interrupted, it is asked again.
            stops = (
                token not in self.stop_tokens
                and self.should_stop is not None
                and self.should_stop([*self.new_tokens, token])
            )
            self._drafted[count - 1 :] = [drafted]
            self._stop_length = count if stops else 0
            self.new_tokens.append(token)

    def end(self, reason: str | Exception) -> None:
        """End it before its time: "cancelled", "deadline", "removed" or an error."""
        self._last_at = self.clock()
        self.ended_by = reason

    def fault(self, token: int, head: str, num_layers: int, position: int) -> str | None:
        """Return the error message for a token of -1, which marks logits that are not finite."""
        if token != -1:
            return None
        causes = "the weights or the states hold NaN or infinity"
        if self.processed:
            causes += ", or bias and processors forbid every token"
        return f"{head} after layer {num_layers} gave logits that are not finite at position {position}; {causes}"

    def drafted(self, start: int = 0) -> list[bool]:
        """Whether each new token from ``start`` on was a draft."""
        return self._drafted[start : len(self.new_tokens)]

    def output(self) -> GenerationOutput:
        """Tokens and statistics so far."""
        rounds, drafted = self._rounds[1:], self.drafted()
        ends = [one.start for one in rounds[1:]] + [len(drafted)]
        stats = Stats(
            prompt_tokens=len(self.prompt_tokens),
            new_tokens=len(drafted),
            records=tuple(
                one.record._replace(accepted=sum(drafted[one.start : end]), emitted=end - one.start)
                for one, end in zip(rounds, ends, strict=False)  # without rounds there is one end
                if one.record is not None
            ),
            seconds=self._last_at - self._started,
            time_to_first_token=self._first_token_at - self._started,
            reused=self.num_reused,
        )
        flags = torch.tensor([drafted], dtype=torch.bool)
        return GenerationOutput(self.all_ids, self._new_ids, flags, (stats,), (self.reason or "",), self.tokenizer)
