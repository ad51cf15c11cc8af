"""Drafts from any source give what autoregressive decoding gives, bit for bit; and what n-grams propose."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, LAYERS, UPPER, VOCABULARY, prompt_of, requires_native, tiny_model

from layerskip import DraftSource, NgramSource, SamplingParams, SelfSpeculativeDecoder, Session
from layerskip.decoding import Choice, Controller
from layerskip.decoding import spec_step as rounds
from layerskip.decoding.draft_sources import GRADES, Lookup
from layerskip.decoding.spec_step import SpecStep
from layerskip.training.exit_analysis import analyze_lookup
from layerskip_kernels import Acceptance

pytestmark = pytest.mark.usefixtures("one_thread")

NEW = 30


class Oracle(DraftSource):
    """A draft source that knows the texts; every ``wrong_every``-th token is wrong."""

    name = "oracle"

    def __init__(self, texts: Sequence[Sequence[int]], wrong_every: int = 0, count: int = 5) -> None:
        self._texts, self._wrong_every, self.max_drafts = [list(text) for text in texts], wrong_every, count

    def propose(self, history: Sequence[int]) -> Sequence[int]:
        end = len(history)
        text = next((text for text in self._texts if text[:end] == history), [])
        return [
            (token + 1) % VOCABULARY if self._wrong_every and place % self._wrong_every == 0 else token
            for place, token in enumerate(text[end : end + self.max_drafts], start=end)
        ]


class Says(DraftSource):
    """A draft source that returns a given proposal, or raises a given error."""

    def __init__(self, proposal: object) -> None:
        self._proposal = proposal

    def propose(self, history: Sequence[int]) -> Sequence[int]:
        if isinstance(self._proposal, BaseException):
            raise self._proposal
        return self._proposal  # type: ignore[return-value]


def sources_of(texts: list[list[int]]) -> dict[str, str | DraftSource]:
    return {
        "ngram": "ngram",
        "auto": "auto",
        "texts": NgramSource([[1, 2, 3], *texts], {1: 1, 2: 7, 4: 3}),
        "oracle": Oracle(texts),
        "half right": Oracle(texts, wrong_every=3),
        "always wrong": Oracle(texts, wrong_every=1),
        "silent": Says([]),
        "too long": Says([7] * 40),
    }


def rows(out) -> list[list[int]]:
    return [row[: stats.new_tokens].tolist() for row, stats in zip(out.new_tokens, out.per_sequence, strict=True)]


@requires_native
@settings(max_examples=60, deadline=None)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    upper=st.sampled_from(sorted(UPPER)),
    exit_layer=st.just("auto") | st.integers(1, LAYERS - 1),
    count=st.just("auto") | st.integers(1, 8),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    new_tokens=st.integers(1, NEW),
    stop=st.none() | st.integers(0, VOCABULARY - 1),
    penalty=st.sampled_from((1.0, 1.0, 1.3)),
    seed=st.integers(0, 2**16),
    source=st.sampled_from(sorted(sources_of([]))),
)
def test_any_source_equals_autoregressive(
    architecture, dtype, upper, exit_layer, count, lengths, new_tokens, stop, penalty, seed, source
):
    decoder = SelfSpeculativeDecoder(tiny_model(architecture, dtype, upper, seed), exit_layer, count)
    prompts = [prompt_of(length, seed + length)[0] for length in lengths]
    stops, sampling = [] if stop is None else stop, SamplingParams(repetition_penalty=penalty)
    shared = {"eos_token_id": stops, "sampling": sampling}
    plain = decoder.generate(prompts, new_tokens, strategy="autoregressive", **shared)
    texts = [prompt.tolist() + new for prompt, new in zip(prompts, rows(plain), strict=True)]
    out = decoder.generate(prompts, new_tokens, draft_source=sources_of(texts)[source], **shared)
    assert rows(out) == rows(plain)
    assert out.reasons == plain.reasons


@requires_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_holds_the_same_bits(dtype):
    """Of accepted tokens: rejected drafts are overwritten before they are read."""
    decoder = SelfSpeculativeDecoder(tiny_model("smollm2", dtype), 1)

    def decoded(**options):
        out = decoder.generate(prompt_of(7), NEW, **options)
        cache, end = decoder._draft_model.caches.idle[-1][0], out.sequences.shape[1] - 1
        return out.sequences[0].tolist(), cache.k[:, 0, :, :end].clone(), cache.v[:, 0, :, :end].clone()

    text, keys, values = decoded(strategy="autoregressive")
    for source in (Oracle([text], 3), "ngram", "auto"):
        again, own_keys, own_values = decoded(draft_source=source)
        assert again == text
        assert torch.equal(own_keys, keys)
        assert torch.equal(own_values, values)


@requires_native
def test_accepted_drafts_are_counted_by_source():
    decoder = SelfSpeculativeDecoder(tiny_model(), 1)
    text = decoder.generate(prompt_of(7), NEW, strategy="autoregressive").sequences[0].tolist()
    right = decoder.generate(prompt_of(7), NEW, draft_source=Oracle([text])).stats
    assert right.by_source == {"oracle": (right.drafted, right.accepted)}
    assert right.acceptance_rate == 1.0
    assert right.rounds == -(-(NEW - 1) // 6)
    wrong = decoder.generate(prompt_of(7), NEW, draft_source=Oracle([text], 1)).stats
    assert wrong.accepted == 0 < wrong.drafted
    assert wrong.rounds == NEW - 1
    silent = decoder.generate(prompt_of(7), NEW, draft_source=Says(())).stats
    assert silent.by_source == {}
    both = decoder.generate([prompt_of(7)[0]] * 2, NEW, draft_source=Oracle([text]))
    assert both.stats.by_source == {"oracle": (2 * right.drafted, 2 * right.accepted)}


@requires_native
def test_drafts_are_counted_by_position():
    """A source that is wrong at every third place of the text, and proposes five tokens."""
    decoder = SelfSpeculativeDecoder(tiny_model(), 1)
    text = decoder.generate(prompt_of(7), NEW, strategy="autoregressive").sequences[0].tolist()
    stats = decoder.generate(prompt_of(7), NEW, draft_source=Oracle([text], 3)).stats
    # The prompt has 7 tokens and verification gives place 7, so the first round drafts place 8, and misses 9; those
    # after it draft 10 and 11, and miss 12, and so on. The last round drafts 34 and 35, and 36 is behind the end.
    assert stats.by_position == {"oracle": ((10, 10), (10, 9), (8, 0))}
    both = decoder.generate([prompt_of(7)[0]] * 2, NEW, draft_source=Oracle([text], 3)).stats
    assert both.by_position == {"oracle": ((20, 20), (20, 18), (16, 0))}
    whole = decoder.generate(prompt_of(7), NEW, draft_source=Oracle([text])).stats.by_position["oracle"]
    assert [count.drafted for count in whole] == [count.accepted for count in whole]
    ended = decoder.generate(prompt_of(7), NEW, draft_source=Oracle([text]), eos_token_id=text[10]).stats
    assert all(count.drafted == count.accepted for count in ended.by_position["oracle"])


@requires_native
@pytest.mark.parametrize("bug", ["one too many", "states of other tokens"])
def test_a_wrong_round_is_detected(bug, monkeypatch):
    decoder = SelfSpeculativeDecoder(tiny_model(), 1)
    plain = decoder.generate(prompt_of(7), NEW, strategy="autoregressive").sequences
    accept, look_up = rounds.accept_greedy, SpecStep._look_up

    def generous(draft, target, seq_lens):
        accepted, token = accept(draft, target, seq_lens)
        more = (accepted + 1).clamp(max=draft.shape[1])
        seq_lens += more - accepted
        return Acceptance(more, token)

    def shifted(*args):
        drafted = look_up(*args)
        return drafted._replace(states=drafted.states.roll(1, 1))

    if bug == "one too many":
        monkeypatch.setattr(rounds, "accept_greedy", generous)
    else:
        monkeypatch.setattr(SpecStep, "_look_up", shifted)
    out = decoder.generate(prompt_of(7), NEW, draft_source=Oracle([plain[0].tolist()], 3))
    assert not torch.equal(out.sequences, plain)


def run(session: Session) -> dict[int, tuple[list[int], Exception | None]]:
    """The tokens of a session's requests, and their errors."""
    tokens, errors = {}, {}
    while len(session):
        for update in session.step():
            tokens.setdefault(update.request_id, []).extend(update.tokens)
            errors[update.request_id] = update.error
    return {number: (tokens[number], errors[number]) for number in sorted(tokens)}


@pytest.fixture(scope="module")
def decoder():
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4)


class TestBatches:
    """Requests of one session whose drafts have different sources."""

    @requires_native
    @pytest.mark.parametrize(
        "sampling",
        [
            SamplingParams(),
            SamplingParams(0.8, seed=3),
            SamplingParams(repetition_penalty=1.2),
            SamplingParams(1.0, top_k=9, seed=5),
        ],
        ids=["greedy", "drawn", "greedy, processed", "drawn, processed"],
    )
    def test_mixed_sources_give_the_tokens_of_each_alone(self, decoder, sampling, monkeypatch):
        prompts = [prompt_of(length, length)[0] for length in (5, 9, 3, 12, 8)]
        sources = ["exit", "ngram", NgramSource([prompts[0].tolist()]), "exit", Says([5, 7])]
        alone = [
            decoder.generate([prompt], NEW, draft_source=source, sampling=[sampling]).new_tokens[0].tolist()
            for prompt, source in zip(prompts, sources, strict=True)
        ]
        mixed = []
        speculate = SpecStep.speculate

        def record(self, sequences, *args):
            if (lookup_rows := args[-1]) is not None:
                mixed.append((len(sequences.token) - len(lookup_rows), len(lookup_rows)))
            return speculate(self, sequences, *args)

        monkeypatch.setattr(SpecStep, "speculate", record)
        session = decoder.open_session(4, max_seq_len=64, num_speculations=12, prompt_tokens_per_step=None)
        for prompt, source in zip(prompts, sources, strict=True):
            session.add(prompt, NEW, draft_source=source, sampling=sampling)
        assert [tokens for tokens, _ in run(session).values()] == alone
        assert len(mixed) > 5
        assert max(drafting for drafting, _ in mixed) == 2
        assert max(looking_up for _, looking_up in mixed) >= 2

    @requires_native
    def test_sequences_of_a_batch_change_places(self, decoder, monkeypatch):
        """Who takes lookup drafts differs from round to round, in the same batch."""
        turns, rows, speculate = itertools.cycle([[None, 3], [3, None]]), [], SpecStep.speculate

        def record(self, sequences, *args):
            rows.append(args[-1])
            return speculate(self, sequences, *args)

        monkeypatch.setattr(SpecStep, "speculate", record)
        choose = lambda controller, rates, *args: (Choice(1, 3), next(turns)[: len(rates)])  # noqa: E731
        monkeypatch.setattr(Controller, "choose_with_lookups", choose)
        session = decoder.open_session(2, max_seq_len=64, num_speculations=12)
        prompts = [prompt_of(6, seed).repeat(1, 2) for seed in range(2)]
        for prompt in prompts:
            session.add(prompt, NEW, draft_source="auto", eos_token_id=[])
        tokens = run(session)
        assert rows[:4] == [[1], [0], [1], [0]]
        for got, prompt in zip(tokens.values(), prompts, strict=True):
            assert got[0] == decoder.generate(prompt, NEW, eos_token_id=[]).new_tokens[0].tolist()

    @requires_native
    def test_they_share_a_pass_through_the_later_layers(self, decoder, monkeypatch):
        passes = []
        forward = decoder.model.decoder.forward
        monkeypatch.setattr(
            decoder.model.decoder,
            "forward",
            lambda hidden, cache, start=0, end=None, *rest: (
                passes.append((start, end, hidden.shape[0])) or forward(hidden, cache, start, end, *rest)
            ),
        )
        session = decoder.open_session(2, max_seq_len=64, num_speculations=12)
        session.add(prompt_of(5), NEW, draft_source="exit")
        session.add(prompt_of(5), NEW, draft_source=Says([1, 2, 3]))
        session.step()
        passes.clear()
        session.step()
        assert passes == [(0, 1, 1), (1, LAYERS, 2)]

    @pytest.mark.parametrize(
        ("proposal", "error", "message"),
        [
            (RuntimeError("broken"), RuntimeError, "broken"),
            ([3, VOCABULARY], ValueError, f"source Says proposed token id {VOCABULARY}, outside the vocabulary of"),
            ([-1], ValueError, "source Says proposed token id -1, outside"),
            ([1.0], TypeError, "source Says must give token ids, got 1.0"),
            ([True], TypeError, "token ids, got True"),
            (7, TypeError, "source Says must give a sequence of token ids, got 7"),
        ],
        ids=str,
    )
    def test_a_faulty_source_ends_its_own_request_only(self, decoder, proposal, error, message):
        plain = decoder.generate(prompt_of(5), NEW, strategy="autoregressive").new_tokens[0].tolist()
        session = decoder.open_session(3, max_seq_len=64)
        session.add(prompt_of(5), NEW, draft_source="ngram")
        broken = session.add(prompt_of(5), NEW, draft_source=Says(proposal))
        session.add(prompt_of(5), NEW, draft_source="auto")
        results = run(session)
        tokens, raised = results.pop(broken)
        assert tokens == plain[:1]
        assert isinstance(raised, error)
        with pytest.raises(error, match=message):
            raise raised
        assert [result for result, _ in results.values()] == [plain, plain]

    def test_an_interrupt_in_a_source_loses_nothing(self, decoder):
        class Interrupted(Oracle):
            calls = 0

            def propose(self, history):
                self.calls += 1
                if self.calls == 3:
                    raise KeyboardInterrupt
                return super().propose(history)

        text = decoder.generate(prompt_of(5), NEW, strategy="autoregressive").sequences[0].tolist()
        session, tokens, interrupts = decoder.open_session(2, max_seq_len=64), {}, 0
        for source in ("ngram", Interrupted([text], 4), "exit"):
            tokens[session.add(prompt_of(5), NEW, draft_source=source)] = []
        while len(session):
            try:
                updates = session.step()
            except KeyboardInterrupt:
                interrupts += 1
                continue
            for update in updates:
                tokens[update.request_id] += update.tokens
        assert interrupts == 1
        assert list(tokens.values()) == [text[5:]] * 3

    def test_a_failing_processor_ends_its_own_request_only(self, decoder):
        """In a mixed round, too, whose sequences are numbered anew."""

        def fails_late(history, logits):
            if len(history) > 15:
                raise RuntimeError("broken")
            return logits

        same = SamplingParams(repetition_penalty=1.1)
        plain = decoder.generate(prompt_of(5), NEW, strategy="autoregressive", sampling=same).new_tokens[0].tolist()
        session = decoder.open_session(4, max_seq_len=64)
        for source, processor in (("exit", None), ("ngram", None), ("ngram", fails_late), ("exit", None)):
            session.add(prompt_of(5), NEW, draft_source=source, logits_processor=processor, sampling=same)
        results = list(run(session).values())
        assert str(results[2][1]) == "broken"
        assert [tokens for index, (tokens, _) in enumerate(results) if index != 2] == [plain] * 3


class TestWhatIsTaken:
    def test_invalid_sources(self):
        model = tiny_model()
        with pytest.raises(ValueError, match="draft_source must be one of 'exit', 'ngram', 'auto', or a DraftSource"):
            SelfSpeculativeDecoder(model, 1, draft_source="n-gram")
        decoder = SelfSpeculativeDecoder(model, 1)
        with pytest.raises(ValueError, match="or a DraftSource, got 7"):
            decoder.generate(prompt_of(5), 4, draft_source=7)
        huge = Says([1])
        huge.max_drafts = 2000
        with pytest.raises(ValueError, match="max_drafts of Says must be in 1 … 1024, got 2000"):
            decoder.generate(prompt_of(5), 4, draft_source=huge)

    def test_a_session_has_room_for_the_drafts_that_it_was_opened_for(self):
        decoder = SelfSpeculativeDecoder(tiny_model(), 1)
        text = decoder.generate(prompt_of(5), NEW, strategy="autoregressive").sequences[0].tolist()
        session = decoder.open_session(1, max_seq_len=64, num_speculations=3)
        request = session.add(prompt_of(5), NEW, num_speculations=3, draft_source=Oracle([text], count=9))
        assert run(session)[request] == (text[5:], None)

    def test_lookup_needs_no_exit(self):
        decoder = SelfSpeculativeDecoder(tiny_model(), draft_source="ngram")
        plain = decoder.generate(prompt_of(5), NEW, strategy="autoregressive")
        assert torch.equal(decoder.generate(prompt_of(5), NEW).sequences, plain.sequences)

    def test_the_sequences_of_a_call_have_a_state_each(self):
        decoder, made = SelfSpeculativeDecoder(tiny_model(), 1), []

        class Counting(Says):
            def new(self):
                made.append(Counting([1]))
                return made[-1]

        decoder.generate([prompt_of(5)[0], prompt_of(3)[0]], 4, draft_source=Counting([2]))
        assert len(made) == 2

    def test_a_source_without_propose(self):
        decoder = SelfSpeculativeDecoder(tiny_model(), 1)
        with pytest.raises(NotImplementedError, match=r"DraftSource has no propose\(history\)"):
            decoder.generate(prompt_of(5), 4, draft_source=DraftSource())


def searched(history: list[int], texts: list[list[int]], grades: dict[int, int]) -> list[int]:
    """What `NgramSource` proposes, by search."""
    for length in sorted(grades, reverse=True):
        if length > len(history):
            continue
        joined = [token for text in texts for token in (*text, -1)]
        for own, text in ((True, history), (False, joined)):
            for place in range(len(text) - 1, length - 1, -1):
                if text[place - length : place] == history[-length:] and text[place] != -1:
                    found = text[place : place + grades[length]]
                    if own:
                        return [found[index % len(found)] for index in range(grades[length])]
                    return found[: found.index(-1)] if -1 in found else found
    return []


class TestNgrams:
    @settings(max_examples=200, deadline=None)
    @given(
        history=st.lists(st.integers(0, 3), min_size=1, max_size=40),
        texts=st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=3),
        grades=st.dictionaries(st.integers(1, 5), st.integers(1, 6), min_size=1),
        steps=st.integers(1, 5),
    )
    def test_it_proposes_what_a_search_finds(self, history, texts, grades, steps):
        source, grown = NgramSource(texts, grades).new(), []
        while len(grown) < len(history):
            grown += history[len(grown) : len(grown) + steps]
            assert list(source.propose(grown)) == searched(grown, texts, grades)

    def test_the_longer_match_wins_then_the_later_one(self):
        source = NgramSource()
        assert source.propose([1, 2, 3, 4, 9, 2, 3, 5, 9, 3, 6, 1, 2, 3]) == [4, 9, 2, 3, 5, 9, 3, 6, 1, 2, 3, 4]
        assert source.match == 3
        source = NgramSource()
        assert source.propose([2, 3, 4, 9, 2, 3, 5, 7, 2, 3]) == [5, 7, 2, 3]
        assert source.match == 2
        assert NgramSource().propose([3, 4, 3, 5, 3]) == [5, 3]
        assert NgramSource().propose([1, 2, 3]) == ()

    def test_match_is_the_full_length(self):
        source = NgramSource()
        source.propose([9, *range(8), 8, 7, *range(8)])
        assert source.match == 8

    def test_repetitions_continue(self):
        assert NgramSource().propose([1, 2, 1, 2]) == [1, 2, 1, 2]
        assert NgramSource().propose([5, 5, 5, 5]) == [5] * 12

    def test_proposals_end_with_their_text(self):
        source = NgramSource([[1, 2, 3, 4], [3, 4, 5]])
        assert source.new().propose([8, 1, 2]) == [3, 4]
        assert source.new().propose([8, 3, 4]) == [5]
        assert source.new().propose([8, 4, 3]) == [4, 5]
        assert source.new().propose([8, 5]) == ()

    def test_sequences_share_texts_and_nothing_else(self):
        source = NgramSource([[1, 2, 3]])
        one, other = source.new(), source.new()
        assert one.propose([7, 8, 7]) == [8, 7]
        assert other.propose([8, 7]) == ()
        assert one._texts is other._texts

    def test_each_token_is_indexed_once(self):
        """So a proposal costs the same whether the text is short or long."""

        class Watched(list):
            looks = 0

            def __getitem__(self, index):
                self.looks += 1
                return super().__getitem__(index)

        costs = []
        for length in (50, 5000):
            history, source = Watched(range(length)), NgramSource()
            source.propose(history)
            before = history.looks
            history.append(3)
            source.propose(history)
            costs.append(history.looks - before)
        assert costs[0] == costs[1] < 40

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"grades": {}}, ValueError, "grades must hold at least one length"),
            ({"grades": {0: 3}}, ValueError, "a length of n-grams in grades must be at least 1, got 0"),
            ({"grades": {2: 0}}, ValueError, r"grades\[2\] must be in 1 … 1024, got 0"),
            ({"texts": [["a"]]}, TypeError, "a token of texts must be an int, got 'a'"),
            ({"texts": [[-1]]}, ValueError, "a token of texts must be at least 0, got -1"),
        ],
    )
    def test_errors(self, arguments, error, message):
        with pytest.raises(error, match=message):
            NgramSource(**arguments)

    def test_grades_are_what_is_documented(self):
        assert GRADES == {1: 2, 2: 4, 3: 12}


def test_lookup_proposes_no_more_than_can_be_emitted():
    asked = Lookup(Says([1, 2, 3]), [5, 6], VOCABULARY)
    asked.propose([7], 2)
    assert asked.proposal.tokens == [1, 2]
    asked.propose([7, 8], 0)
    assert asked.proposal.tokens == []


def test_lookup_analysis_counts_what_decoding_would_accept():
    """A prompt of three tokens, and seven after it; the other text has none."""
    analysis = analyze_lookup([(torch.tensor([1, 2, 3, 1, 2, 3, 4, 2, 3, 5]), 3), (torch.tensor([7]), 1)])
    # By place: 3 nothing; 4 after 1 comes 2 3, right; 5 after 1 2 comes 3, right, then 1, wrong; 6 after 1 2 3 comes 1,
    # wrong; 7 nothing; 8 after 2 comes 3, right; 9 after 2 3 comes 4, wrong.
    assert (analysis.positions, analysis.found, analysis.right) == (7, 5, 3)
    assert analysis.tokens_per_round == 7 / 4  # rounds at 3, 4, 7 and 8, of 1, 3, 1 and 2 tokens
    with pytest.raises(ValueError, match="there is no continuation to analyze"):
        analyze_lookup([(torch.tensor([7]), 1)])


@requires_native
def test_lookup_analysis_agrees_with_decoding():
    decoder = SelfSpeculativeDecoder(tiny_model(), 1, draft_source="ngram")
    out = decoder.generate(prompt_of(7), 60)
    analysis = analyze_lookup([(out.sequences[0], 8)])  # verification gives the first token
    assert analysis.tokens_per_round == pytest.approx(59 / out.stats.rounds)
