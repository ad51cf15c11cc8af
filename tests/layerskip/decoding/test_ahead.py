"""Rounds that run ahead of what the host reads: the same tokens as without, whatever ends a sequence, and when."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from exits_of import copied_exit
from gpus import FakeGPU, InOrder, graphs_on
from tiny import ROUND, prompt_of, requires_native, tiny_model
from tokenizers_of import KINDS

import layerskip_kernels
from layerskip import SamplingParams, SelfSpeculativeDecoder, adapt
from layerskip.decoding import batch, cuda_graphs
from layerskip.decoding.adaptive import Choice
from layerskip.decoding.batch import Batch
from layerskip.decoding.session import Session

pytestmark = [pytest.mark.usefixtures("one_thread"), requires_native]
DRAWN = SamplingParams(0.8, seed=5)
SAMPLING = {"greedy": None, "drawn": DRAWN}
# The first of the four layers drafts; of its drafts some hold, or all.
UPPER = ["weak", "silent"]


def decoder_of(upper: str = "weak", **options: Any) -> SelfSpeculativeDecoder:
    return SelfSpeculativeDecoder(tiny_model(upper=upper), **{"exit_layer": 1, "num_speculations": 3, **options})


@pytest.fixture
def gpu(monkeypatch) -> FakeGPU:
    """Decoders that are made from now on record their rounds."""
    gpu = FakeGPU()
    monkeypatch.setattr(cuda_graphs, "for_device", lambda device: graphs_on(gpu))
    return gpu


def both(call: Callable[[SelfSpeculativeDecoder], Any], upper: str = "weak", **options: Any) -> tuple[Any, FakeGPU]:
    """What a call gives, without graphs and on a GPU, where it must be the same."""
    with pytest.MonkeyPatch.context() as patch:
        expected = call(decoder_of(upper, **options))
        gpu = FakeGPU()
        patch.setattr(cuda_graphs, "for_device", lambda device: graphs_on(gpu))
        with InOrder(gpu):
            assert call(decoder_of(upper, **options)) == expected
    return expected, gpu


def alone(prompt: torch.Tensor, count: int, upper: str = "weak", **options: Any) -> list[int]:
    """The tokens without graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "for_device", lambda device: None)
        out = decoder_of(upper).generate(prompt, count, **{"eos_token_id": [], **options})
    return out.new_tokens[0].tolist()


def result(out: Any) -> tuple:
    return out.new_tokens.tolist(), out.reasons


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("upper", UPPER)
def test_a_rule_that_stops_at_every_token(upper, kind):
    for length in range(1, 14):

        def ends(tokens: list[int], length: int = length) -> bool:
            return len(tokens) == length

        _, gpu = both(
            lambda decoder: result(
                decoder.generate(prompt_of(5), 30, should_stop=ends, sampling=SAMPLING[kind], eos_token_id=[])
            ),
            upper,
        )
    assert gpu.most_unread == 2


@pytest.mark.parametrize("kind", SAMPLING)
def test_an_end_of_sequence_in_the_middle_of_a_round(kind):
    options = {"sampling": SAMPLING[kind], "eos_token_id": []}
    for token in sorted(set(alone(prompt_of(5), 24, **options))):
        options["eos_token_id"] = [token]
        both(lambda decoder: result(decoder.generate(prompt_of(5), 24, **options)))


@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive", "early_exit"])
@pytest.mark.parametrize("kind", SAMPLING)
def test_every_number_of_tokens(kind, strategy):
    for count in range(1, 12):
        options = {"strategy": strategy, "sampling": SAMPLING[kind], "eos_token_id": []}
        both(lambda decoder: result(decoder.generate(prompt_of(5), count, **options)))  # noqa: B023


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("upper", UPPER)
def test_a_batch_whose_sequences_end_in_different_rounds(upper, kind):
    prompts = [prompt_of(length, length)[0] for length in (3, 9, 5, 7, 4)]
    rules = [lambda tokens, end=end: len(tokens) == end for end in (4, 17, 9, 30, 5)]
    _, gpu = both(
        lambda decoder: result(
            decoder.generate(prompts, 20, should_stop=rules, sampling=SAMPLING[kind], eos_token_id=[])
        ),
        upper,
    )
    assert gpu.most_unread == 2


def test_no_round_is_launched_that_cannot_be_needed():
    """The first token comes with the prompt; of 10 the last one ends the sequence, and it is known before."""
    options = {"strategy": "autoregressive", "eos_token_id": []}
    _, gpu = both(lambda decoder: result(decoder.generate(prompt_of(5), 10, **options)))
    assert gpu.replays == 9
    assert gpu.most_unread == 2


def test_a_round_ahead_counts_for_requests_that_continue():
    prompts, rules = [prompt_of(5)[0]] * 2, [lambda tokens: len(tokens) == 4, lambda tokens: False]
    options = {"strategy": "autoregressive", "eos_token_id": [], "should_stop": rules}
    _, gpu = both(lambda decoder: result(decoder.generate(prompts, 10, **options)))
    assert gpu.replays == 9
    assert gpu.captures == 2  # of two sequences, and of one


def test_an_unexpected_end_wastes_one_round():
    options = {"strategy": "autoregressive", "eos_token_id": [], "should_stop": lambda tokens: len(tokens) == 4}
    _, gpu = both(lambda decoder: result(decoder.generate(prompt_of(5), 10, **options)))
    assert gpu.replays == 4


def step(session: Session, gpu: FakeGPU) -> list:
    with InOrder(gpu):
        return session.step()


@pytest.mark.parametrize("end", ["cancel", "remove"])
def test_a_slot_can_be_reused_while_a_round_is_in_flight(gpu, end):
    session = decoder_of().open_session(2, max_seq_len=60, prompt_tokens_per_step=None)  # whatever the clock says
    prompts = [prompt_of(5, index) for index in range(4)]
    ids = [session.add(prompt, 30, eos_token_id=[]) for prompt in prompts]
    got: dict[int, list[int]] = {one: [] for one in ids}
    for turn in range(40):
        for update in step(session, gpu):
            got[update.request_id] += update.tokens
        if turn == 3:
            getattr(session, end)(ids[0])
    assert len(session) == 0
    assert gpu.most_unread == 2
    texts = [alone(prompt, 30) for prompt in prompts]
    assert [got[one] for one in ids[1:]] == texts[1:]
    assert 0 < len(got[ids[0]]) < 30
    assert got[ids[0]] == texts[0][: len(got[ids[0]])]


def test_continuing_a_retained_request(gpu):
    """The round that ran ahead wrote behind the retained tokens."""
    prompt, session = prompt_of(5), decoder_of().open_session(2, max_seq_len=60)
    first = session.add(prompt, 30, eos_token_id=[], should_stop=lambda tokens: len(tokens) == 6, keep=True)
    updates = []
    while len(session):
        updates += step(session, gpu)
    more = [3, 1, 4]
    continued = session.add(more, 12, eos_token_id=[], continue_from=first)
    got: dict[int, list[int]] = {continued: [], session.add(prompt, 12, eos_token_id=[]): []}
    while len(session):
        for update in step(session, gpu):
            got[update.request_id] += update.tokens
    text = torch.cat([updates[-1].output.sequences[0], torch.tensor(more)])
    for prompt_, tokens in zip((text, prompt[0]), got.values(), strict=True):
        assert tokens == alone(prompt_, 12)


def test_interrupts_lose_nothing(gpu):
    params, interrupts = SamplingParams(0.9, seed=3), [2, 5, 6, 7, 11, 20]

    def interrupted(tokens: list[int]) -> bool:
        if len(tokens) in interrupts:
            interrupts.remove(len(tokens))
            raise KeyboardInterrupt
        return False

    session, updates = decoder_of().open_session(2, max_seq_len=64), []
    session.add(prompt_of(4), 24, should_stop=interrupted, sampling=params, eos_token_id=[])
    while len(session):
        with suppress(KeyboardInterrupt):
            updates += step(session, gpu)
    assert not interrupts
    assert updates[-1].output.new_tokens[0].tolist() == alone(prompt_of(4), 24, sampling=params)


def test_a_stream_can_be_left_early(gpu):
    tokenizer, pieces = KINDS["byte_level"](), []
    decoder, options = decoder_of(), {"tokenizer": tokenizer, "eos_token_id": []}
    with InOrder(gpu):
        whole = "".join(decoder.stream(prompt_of(7), 24, **options))
        for piece in decoder.stream(prompt_of(7), 24, **options):
            pieces.append(piece)
            if len(pieces) == 5:
                break
        again = "".join(decoder.stream(prompt_of(7), 24, **options))
    assert gpu.most_unread == 2
    assert whole == again
    assert whole.startswith("".join(pieces))
    gpu.lazy = False
    assert whole == "".join(decoder.stream(prompt_of(7), 24, **options))


def test_non_finite_states_are_reported(gpu):
    """The round after one that gave no token runs all the same, and the other sequence gets its tokens."""
    prompts, model = [prompt_of(6, seed) for seed in range(2)], tiny_model(upper="silent")
    free = [alone(one, 16, "silent") for one in prompts]
    known = {*free[1], *prompts[0][0].tolist(), *prompts[1][0].tolist()}
    bad = next(token for token in free[0][3:] if token not in known)
    model.model.embed_tokens.weight.data[bad] = float("nan")
    for strategy in ("self_speculative", "autoregressive"):
        session, got = SelfSpeculativeDecoder(model, 1, 3).open_session(2, max_seq_len=40), {}
        ids = [session.add(one, 16, eos_token_id=[], strategy=strategy) for one in prompts]
        while len(session):
            for update in step(session, gpu):
                got.setdefault(update.request_id, []).extend(update.tokens)
                if update.finished:
                    assert (update.error is None) == (update.request_id == ids[1])
        assert got[ids[1]] == free[1]
        assert got[ids[0]] == free[0][: free[0].index(bad) + 1]


class TestTheEndOfTheCache:
    CAPACITY = 32

    def run(self, monkeypatch, upper: str) -> tuple[list[int], FakeGPU, list[int]]:
        """Decode up to the very end of a cache; the furthest position that each round could write."""
        decoder, gpu, ends = decoder_of(upper), FakeGPU(), []

        def watched(*args: Any, **named: Any) -> layerskip_kernels.Round:
            ends.append(int(args[3].seq_lens.numpy().max()) + args[6])
            assert ends[-1] < self.CAPACITY, "a round writes behind the end of the cache"
            return layerskip_kernels.speculative_round(*args, **named)

        monkeypatch.setattr(ROUND, watched)
        most = decoder.num_speculations
        with torch.inference_mode(False):
            cache = decoder.model.decoder.new_cache(1, self.CAPACITY)
        length = self.CAPACITY - most - 1
        session = Session(
            decoder.model, cache, decoder.defaults, decoder.controller, length, most, graphs=graphs_on(gpu)
        )
        session.add(prompt_of(5), length - 5, eos_token_id=[])
        tokens = []
        while len(session):
            for update in step(session, gpu):
                assert update.error is None
                tokens += update.tokens
        return tokens, gpu, ends

    @pytest.mark.parametrize("upper", UPPER)
    def test_no_round_writes_past_the_cache(self, monkeypatch, upper):
        tokens, gpu, ends = self.run(monkeypatch, upper)
        assert max(ends) >= self.CAPACITY - 4
        assert gpu.most_unread == 2
        monkeypatch.undo()
        assert tokens == alone(prompt_of(5), len(tokens), upper)

    def test_a_write_past_the_cache_is_detected(self, monkeypatch):
        monkeypatch.setattr(Batch, "runs_ahead", property(lambda batch: batch.requests[0].remaining > 1))
        with pytest.raises(AssertionError, match="behind the end of the cache"):
            self.run(monkeypatch, "silent")


@pytest.mark.parametrize("kind", SAMPLING)
def test_requests_join_and_leave(gpu, kind):
    """More requests than slots, of every length, some of another kind of round."""
    requests, session = [], decoder_of().open_session(3, max_seq_len=64)
    for index in range(10):
        strategy = "autoregressive" if index % 4 == 3 else "self_speculative"
        sampling = None if SAMPLING[kind] is None else SamplingParams(0.8, seed=index)
        options = {"strategy": strategy, "sampling": sampling, "eos_token_id": []}
        requests.append((prompt_of(3 + index, index), 3 + 5 * index % 17, options))
    ids = [session.add(prompt, count, **options) for prompt, count, options in requests]
    got: dict[int, list[int]] = {}
    while len(session):
        for update in step(session, gpu):
            got.setdefault(update.request_id, []).extend(update.tokens)
    assert gpu.most_unread >= 2
    for one, (prompt, count, options) in zip(ids, requests, strict=True):
        assert got[one] == alone(prompt, count, **options)


def test_the_controller_learns_gpu_times(gpu, monkeypatch):
    """Not how long the host waited, which had other work in the meantime. Greedy tokens do not depend on it."""
    decoder = decoder_of(exit_layer="auto", num_speculations="auto", draft_source="exit")
    seconds = []
    observe = decoder.controller.observe_cost
    monkeypatch.setattr(decoder.controller, "observe_cost", lambda *args: (seconds.append(args[2]), observe(*args)))
    with InOrder(gpu):
        out = decoder.generate(prompt_of(5), 40, eos_token_id=[])
    assert set(seconds) == {1.0}
    assert len(seconds) == out.stats.rounds
    assert gpu.most_unread == 2
    assert out.new_tokens[0].tolist() == alone(prompt_of(5), 40)


@pytest.mark.parametrize(("counts", "catches_up"), [((3, 1), False), ((3, 3, 0), True), ((0, 2), True)])
def test_draft_layers_of_an_exit_while_the_number_of_drafts_changes(gpu, monkeypatch, counts, catches_up):
    """A round ahead with another K: what draft layers have read is known, so drafts of an exact exit all hold."""
    model = tiny_model(upper="weak")
    exit_ = copied_exit(adapt(model), 2, 2)
    decoder = SelfSpeculativeDecoder(model, num_speculations="auto", draft_source="exit", exit=exit_)
    plans, read = itertools.cycle([Choice(decoder.exit_layer, count) for count in counts]), []
    monkeypatch.setattr(decoder.controller, "choose", lambda *given: next(plans))

    def noted(*args: Any, read_: Any = batch.catch_up_draft_layers) -> None:
        *_, request, end = args
        read.append((request.num_draft_cached, end))
        read_(*args)

    monkeypatch.setattr(batch, "catch_up_draft_layers", noted)
    with InOrder(gpu):
        out = decoder.generate(prompt_of(5), 40, eos_token_id=[])
    assert out.new_tokens[0].tolist() == alone(prompt_of(5), 40)
    assert out.stats.accepted == out.stats.drafted > 5
    assert bool(read) == catches_up
    assert sum(end - begin for begin, end in read) <= out.stats.rounds, "one token of each round without drafts"
    assert gpu.most_unread == 2


def test_a_new_choice_takes_effect_with_rounds_in_flight(gpu, monkeypatch):
    """Another K with the next launch, another E with another batch; rounds in flight still count."""
    decoder, read = decoder_of(exit_layer="auto", num_speculations="auto", draft_source="exit"), []
    plans = itertools.cycle([Choice(1, 3)] * 3 + [Choice(1, 2)] * 3 + [Choice(2, 2)] * 3)
    monkeypatch.setattr(decoder.controller, "choose", lambda *given: next(plans))

    def noted(batch: Batch, read_: Any = Batch.read) -> Any:
        launched, results = read_(batch)
        read.append(Choice(batch.kind.exit_layer, launched.num_speculations))
        return launched, results

    monkeypatch.setattr(Batch, "read", noted)
    with InOrder(gpu):
        out = decoder.generate(prompt_of(5), 60, eos_token_id=[])
    assert out.new_tokens[0].tolist() == alone(prompt_of(5), 60)
    assert gpu.captures == 3
    assert gpu.replays - len(read) <= 1  # none was launched and not read, but the last
    assert all(read.count(one) >= 4 for one in (Choice(1, 3), Choice(1, 2), Choice(2, 2)))
