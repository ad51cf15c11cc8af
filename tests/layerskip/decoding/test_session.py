"""Requests that come, go, end and fail in one session, each with the tokens that it would have alone."""

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, LAYERS, ROUND, UPPER, VOCABULARY, prompt_of, requires_native, tiny_model

import layerskip_kernels
from layerskip import DraftHead, SamplingParams, SelfSpeculativeDecoder

pytestmark = pytest.mark.usefixtures("one_thread")


def finish(session) -> dict:
    """Run to the end; the last update of every request, by id. What came in updates is what came out."""
    tokens, last = {}, {}
    while len(session):
        updates = session.step()
        assert len({update.request_id for update in updates}) == len(updates)
        for update in updates:
            assert update.request_id not in last, "nothing follows the last update"
            assert len(update.drafted) == len(update.tokens)
            tokens.setdefault(update.request_id, []).extend(update.tokens)
            if update.finished:
                last[update.request_id] = update
    for request_id, update in last.items():
        given = tokens[request_id]  # since this was called
        assert tokens_of(update)[len(tokens_of(update)) - len(given) :] == given
        assert update.output.reasons == (update.reason,)
    return last


def tokens_of(update) -> list[int]:
    return update.output.new_tokens[0].tolist()


@pytest.fixture(scope="module")
def decoder():
    """Some drafts are accepted, some are not."""
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4)


def alone(decoder, prompt, new_tokens=20, **options) -> list[int]:
    return decoder.generate(prompt.view(1, -1), new_tokens, strategy="autoregressive", **options).new_tokens[0].tolist()


REQUEST = st.fixed_dictionaries(
    {
        "length": st.integers(1, 24),
        "new_tokens": st.integers(1, 24),
        "exit_layer": st.integers(1, LAYERS - 1) | st.just("auto"),
        "num_speculations": st.integers(1, 8) | st.just("auto"),
        "draft_threshold": st.sampled_from((0.0, 0.02, 0.1)),
        "stop": st.none() | st.integers(0, VOCABULARY - 1),
        "rule": st.none() | st.integers(1, 12),
        "strategy": st.sampled_from(("self_speculative",) * 4 + ("autoregressive",)),
        "penalty": st.sampled_from((1.0, 1.0, 1.3)),
    }
)


@requires_native
@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    upper=st.sampled_from(sorted(UPPER)),
    head=st.sampled_from(("full", "int8", "subset")),
    slots=st.integers(1, 4),
    requests=st.lists(REQUEST, min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_every_request_gets_the_tokens_of_decoding_it_alone(architecture, dtype, upper, head, slots, requests, seed):
    draft_head = DraftHead(range(0, VOCABULARY, 2), VOCABULARY) if head == "subset" else head
    decoder = SelfSpeculativeDecoder(tiny_model(architecture, dtype, upper, seed), 1, 8, 60, draft_head)
    session = decoder.open_session(slots, num_speculations="auto")
    expected = {}
    for index, request in enumerate(requests):
        prompt, rule = prompt_of(request["length"], seed + index), request["rule"]
        common = {
            "eos_token_id": [] if request["stop"] is None else request["stop"],
            "sampling": SamplingParams(repetition_penalty=request["penalty"]),
            "should_stop": None if rule is None else lambda tokens, most=rule: len(tokens) == most,
        }
        own = {name: request[name] for name in ("strategy", "exit_layer", "num_speculations", "draft_threshold")}
        request_id = session.add(prompt, request["new_tokens"], **own, **common)
        expected[request_id] = alone(decoder, prompt, request["new_tokens"], **common)
    last = finish(session)
    assert {request_id: tokens_of(update) for request_id, update in last.items()} == expected


@requires_native
def test_a_batch_is_padded_on_the_right(decoder):
    prompts = [prompt_of(length, length)[0] for length in (3, 9, 1)]
    singles = [decoder.generate(prompt[None], 20, eos_token_id=35) for prompt in prompts]
    out = decoder.generate(prompts, 20, eos_token_id=35, pad_token_id=77)
    for row, (prompt, single) in enumerate(zip(prompts, singles, strict=True)):
        count = single.stats.new_tokens
        assert out.per_sequence[row].new_tokens == count
        assert out.sequences[row].tolist()[: len(prompt) + count] == single.sequences[0].tolist()
        assert set(out.sequences[row].tolist()[len(prompt) + count :]) <= {77}
        assert out.new_tokens[row].tolist() == single.new_tokens[0].tolist() + [77] * (out.new_tokens.shape[1] - count)
        assert not out.drafted[row, count:].any()
    assert out.reasons == tuple(single.reasons[0] for single in singles)
    assert out.stats.new_tokens == sum(single.stats.new_tokens for single in singles)
    assert out.stats.sequences == 3
    assert out.stats.rounds == sum(row.rounds for row in out.per_sequence)
    assert out.stats.seconds == max(row.seconds for row in out.per_sequence)
    assert out.sequences.shape[1] > out.new_tokens.shape[1]
    assert (out.sequences == 77).any()
    lists = decoder.generate([prompt.tolist() for prompt in prompts], 20, eos_token_id=35)
    assert (lists.sequences == 35).sum() > (out.sequences == 35).sum(), "without a padding token, the EOS token pads"


def test_a_tensor_is_a_batch_of_its_rows(decoder):
    prompts = torch.cat([prompt_of(6, seed) for seed in range(3)])
    out = decoder.generate(prompts, 10)
    assert torch.equal(out.sequences[:, :6], prompts)
    assert torch.equal(out.sequences[:, 6:], out.new_tokens)


@requires_native
def test_a_stop_at_any_position_of_a_draft_leaves_others_running():
    decoder = SelfSpeculativeDecoder(tiny_model(upper="silent"), 1, 8)
    prompts = [prompt_of(5, seed) for seed in range(2)]
    free = [alone(decoder, prompt, 30) for prompt in prompts]
    for stop in free[0][:20]:
        session = decoder.open_session(2, max_seq_len=40)
        first = session.add(prompts[0], 30, eos_token_id=stop)
        second = session.add(prompts[1], 30, eos_token_id=[])
        last = finish(session)
        assert tokens_of(last[first]) == free[0][: free[0].index(stop) + 1]
        assert tokens_of(last[second]) == free[1]
        assert (last[first].reason, last[second].reason) == ("eos", "length")


@requires_native
def test_one_sequence_may_fill_its_slot(decoder):
    """The row at the end rides along in rounds that draft past it; drafts are more than it has tokens left."""
    session = decoder.open_session(3, max_seq_len=32, num_speculations=8)
    prompts = [prompt_of(length, length) for length in (30, 4, 12)]
    counts = (2, 28, 20)
    ids = [
        session.add(prompt, count, num_speculations=8, eos_token_id=[])
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    last = finish(session)
    for request_id, prompt, count in zip(ids, prompts, counts, strict=True):
        assert tokens_of(last[request_id]) == alone(decoder, prompt, count, eos_token_id=[])
        assert last[request_id].output.stats.drafted <= 8 * last[request_id].output.stats.rounds


def test_more_requests_than_slots_wait(decoder):
    session = decoder.open_session(2, max_seq_len=40)
    prompts = [prompt_of(3 + index, index) for index in range(5)]
    ids = [session.add(prompt, 6, eos_token_id=[]) for prompt in prompts]
    assert len(session) == 5
    begun, order = set(), []
    while len(session):
        updates = session.step()
        order += [update.request_id for update in updates if update.request_id not in begun]
        begun |= set(order)
    assert order == ids


def test_finished_sequences_cost_nothing(decoder, monkeypatch):
    """They are not among the rows that the kernels are given."""
    sizes = []

    def watched(*args, **named):
        sizes.append(args[0].shape[0])
        return layerskip_kernels.speculative_round(*args, **named)

    monkeypatch.setattr(ROUND, watched)
    decoder.generate(
        [prompt_of(4, seed)[0] for seed in range(3)], 30, should_stop=[lambda tokens: len(tokens) > 4, None, None]
    )
    assert sizes[0] == 3
    assert sizes[-1] < 3
    assert sizes == sorted(sizes, reverse=True)


def test_requests_that_share_an_exit_share_their_rounds(decoder, monkeypatch):
    calls = []

    def watched(*args, **named):
        calls.append((args[4], args[0].shape[0]))
        return layerskip_kernels.speculative_round(*args, **named)

    monkeypatch.setattr(ROUND, watched)
    session = decoder.open_session(4, max_seq_len=40)
    for index, exit_layer in enumerate((1, 2, 1, 2)):
        session.add(prompt_of(4, index), 12, exit_layer=exit_layer, num_speculations=1 + index, eos_token_id=[])
    finish(session)
    assert calls[:2] == [(1, 2), (2, 2)]


@requires_native
def test_the_highest_priority_gets_the_next_slot(decoder):
    session, order, last = decoder.open_session(1), [], {}
    ids = [session.add(prompt_of(4, 0), 8, priority=0)]
    last |= {update.request_id: update for update in session.step()}  # it has the slot
    ids += [session.add(prompt_of(4, seed), 8, priority=priority) for seed, priority in enumerate((0, 5, -1, 5), 1)]
    while len(session):
        for update in session.step():
            if update.finished:
                order.append(ids.index(update.request_id))
                assert tokens_of(update) == alone(decoder, prompt_of(4, order[-1]), 8)
    assert order == [0, 2, 4, 1, 3]


@requires_native
def test_a_deadline_ends_what_runs_and_what_waits(decoder):
    session, now = decoder.open_session(2), [0.0]
    session._clock = lambda: now[0]
    prompts = [prompt_of(4, seed) for seed in range(4)]
    ids = [session.add(prompts[index], 40, deadline=deadline) for index, deadline in enumerate((2, None, 2, 100))]
    started = [update for _ in range(3) for update in session.step()]
    assert {update.request_id for update in started} == set(ids[:2])
    now[0] = 2.0
    last = finish(session)
    assert [last[one].reason for one in ids] == ["deadline", "length", "deadline", "length"]
    part, none = tokens_of(last[ids[0]]), tokens_of(last[ids[2]])
    assert 0 < len(part) < 40
    assert part == alone(decoder, prompts[0], 40)[: len(part)]
    assert none == []
    for index in (1, 3):
        assert tokens_of(last[ids[index]]) == alone(decoder, prompts[index], 40)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"priority": 0.5}, TypeError, "priority must be an int, got 0.5"),
        ({"deadline": 0}, ValueError, r"deadline must be in \(0, inf\], got 0"),
        ({"deadline": "1"}, TypeError, "deadline must be a number, got '1'"),
    ],
)
def test_wrong_priorities_and_deadlines_add_nothing(decoder, options, error, message):
    session = decoder.open_session(1)
    with pytest.raises(error, match=message):
        session.add(prompt_of(4), 8, **options)
    assert len(session) == 0


@requires_native
def test_cancelled_requests_leave_the_others_alone(decoder):
    session = decoder.open_session(2, max_seq_len=60)
    prompts = [prompt_of(5, index) for index in range(4)]
    ids = [session.add(prompt, 30, eos_token_id=[]) for prompt in prompts]
    session.step()
    updates = session.step()
    session.cancel(ids[0])  # it runs
    session.cancel(ids[2])  # it waits
    with pytest.raises(ValueError, match=f"request_id must be .* got {ids[0]}"):
        session.cancel(ids[0])
    last = finish(session)
    assert last[ids[0]].reason == last[ids[2]].reason == "cancelled"
    expected = alone(decoder, prompts[0], 30, eos_token_id=[])
    got = tokens_of(last[ids[0]])
    assert got == expected[: len(got)]
    assert len(got) == 1 + len(updates[0].tokens)
    assert tokens_of(last[ids[2]]) == []
    for index in (1, 3):
        assert tokens_of(last[ids[index]]) == alone(decoder, prompts[index], 30, eos_token_id=[])


def test_a_removed_request_is_forgotten(decoder):
    session = decoder.open_session(1, max_seq_len=60)
    ids = [session.add(prompt_of(5, index), 30) for index in range(3)]
    session.step()
    session.remove(ids[0])
    session.remove(ids[2])
    assert len(session) == 1
    assert set(finish(session)) == {ids[1]}
    for request_id in (*ids, 99, "1"):
        with pytest.raises(ValueError, match="request_id must be that of a request that has not ended, got"):
            session.remove(request_id)


def test_a_hook_that_fails_ends_its_own_request(decoder):
    def breaks_at(length):
        def hook(history, *rest):
            if len(history) >= length:
                raise RuntimeError(f"broken at {length}")
            return rest[0] if rest else False

        return hook

    session = decoder.open_session(4, max_seq_len=60)
    prompts = [prompt_of(5, index) for index in range(4)]
    ids = [
        session.add(prompts[0], 20, eos_token_id=[], logits_processor=breaks_at(9)),
        session.add(prompts[1], 20, eos_token_id=[], logits_processor=lambda history, logits: logits),
        session.add(prompts[2], 20, eos_token_id=[], should_stop=breaks_at(6)),
        session.add(prompts[3], 20, eos_token_id=[], logits_processor=breaks_at(1)),
    ]
    last = finish(session)
    assert [last[one].reason for one in ids] == ["error", "length", "error", "error"]
    assert str(last[ids[0]].error) == "broken at 9"
    assert str(last[ids[2]].error) == "broken at 6"
    assert tokens_of(last[ids[1]]) == alone(decoder, prompts[1], eos_token_id=[])
    for index in (0, 2):
        got = tokens_of(last[ids[index]])
        assert got == alone(decoder, prompts[index], eos_token_id=[])[: len(got)]
    assert tokens_of(last[ids[3]]) == []
    with pytest.raises(RuntimeError, match="broken at 9"):
        decoder.generate(prompts[0], 20, eos_token_id=[], logits_processor=breaks_at(9))


@requires_native
def test_states_that_are_not_finite_end_one_request():
    """A token's embedding is NaN: requests that contain it fail, the others continue."""
    model = tiny_model(upper="silent")
    decoder = SelfSpeculativeDecoder(model, 1, 4)
    prompts = [prompt_of(6, seed) for seed in range(2)]
    free = [alone(decoder, prompt, 16, eos_token_id=[]) for prompt in prompts]
    bad = next(
        token for token in free[0][3:] if token not in {*free[1], *prompts[0][0].tolist(), *prompts[1][0].tolist()}
    )
    model.model.embed_tokens.weight.data[bad] = float("nan")
    session = decoder.open_session(2, max_seq_len=40)
    ids = [session.add(prompt, 16, eos_token_id=[]) for prompt in prompts]
    last = finish(session)
    assert tokens_of(last[ids[1]]) == free[1]
    assert last[ids[0]].reason == "error"
    assert isinstance(last[ids[0]].error, FloatingPointError)
    assert f"not finite at position {6 + free[0].index(bad)}" in str(last[ids[0]].error)
    got = tokens_of(last[ids[0]])
    assert got == free[0][: len(got)]


@requires_native
def test_a_rejected_draft_whose_state_is_not_finite_ends_nothing():
    """Nor do the drafts after it, which have no logits."""
    model = tiny_model(upper="weak")
    decoder = SelfSpeculativeDecoder(model, 1, 4)
    plain = decoder.generate(prompt_of(6), 40, eos_token_id=[])
    emitted = set(plain.sequences[0].tolist())
    rejected = (one.drafts[one.accepted] for one in plain.stats.records if one.accepted + 1 < len(one.drafts))
    model.model.embed_tokens.weight.data[next(token for token in rejected if token not in emitted)] = float("nan")
    out = decoder.generate(prompt_of(6), 40, eos_token_id=[])
    assert torch.equal(out.sequences, plain.sequences)
    assert any(-1 in one.drafts for one in out.stats.records)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch must be at least 1, got 0"),
        ({"max_batch": 2.0}, TypeError, "max_batch must be an int, got 2.0"),
        ({"max_seq_len": 257}, ValueError, "max_seq_len must be in 1 … 256, got 257"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len must be in 1 … 256, got 0"),
        ({"num_speculations": 0}, ValueError, "num_speculations must be at least 1, got 0"),
    ],
)
def test_invalid_session_arguments(decoder, options, error, message):
    with pytest.raises(error, match=message):
        decoder.open_session(**{"max_batch": 2, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": []}, ValueError, "the prompt is empty"),
        ({"prompt": [1, VOCABULARY]}, ValueError, "token id 101 is outside the vocabulary of 101"),
        ({"prompt": [1, 2.5]}, TypeError, "a token of the prompt must be an int, got 2.5"),
        ({"prompt": torch.ones(2, 3, dtype=torch.int64)}, ValueError, "one prompt is taken here, got 2"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 38}, ValueError, "a prompt of 3 tokens and max_new_tokens=38 make 41, .*max_seq_len=40"),
        ({"num_speculations": 5}, ValueError, "num_speculations must be in 1 … 4, got 5"),
        ({"exit_layer": 4}, ValueError, "exit_layer must be in 1 … 3 for a model of 4 layers, got 4"),
        ({"strategy": "beam"}, ValueError, "unknown strategy 'beam'"),
        ({"strategy": "early_exit", "exit_layer": "auto"}, ValueError, "exit_layer must be an int for .* got 'auto'"),
        ({"draft_threshold": -0.1}, ValueError, r"draft_threshold must be in \[0, 1\], got -0.1"),
        ({"eos_token_id": [200]}, ValueError, "eos_token_id 200 is outside the vocabulary of 101"),
        ({"sampling": "greedy"}, TypeError, "sampling must be a SamplingParams, got str"),
    ],
)
def test_an_invalid_request_leaves_no_trace(decoder, options, error, message):
    session = decoder.open_session(1, max_seq_len=40)
    with pytest.raises(error, match=message):
        session.add(**{"prompt": [1, 2, 3], "max_new_tokens": 4, **options})
    assert len(session) == 0
    assert session.step() == []


@requires_native
@pytest.mark.slow
@pytest.mark.time_limit(7200)
def test_10k_requests_leave_nothing_behind(decoder):
    """Of random shapes, coming and going: no mismatch, and no memory that grows."""
    chance = random.Random(0)
    shapes = [(chance.randint(1, 12), chance.randint(1, 8), seed) for seed in range(60)]
    expected = [alone(decoder, prompt_of(length, seed), count) for length, count, seed in shapes]
    session = decoder.open_session(16, max_seq_len=24)
    mine, finished, sizes = {}, 0, []
    tracemalloc.start()
    for number in range(10_000):
        index = chance.randrange(len(shapes))
        length, count, seed = shapes[index]
        mine[session.add(prompt_of(length, seed), count, num_speculations=chance.randint(1, 4))] = index
        if chance.random() < 0.02:
            victim = chance.choice(list(mine))
            (session.remove if chance.random() < 0.5 else session.cancel)(victim)
            mine.pop(victim)
        while len(session) > 32 or (number == 9_999 and len(session)):
            for update in session.step():
                if update.finished and update.reason != "cancelled":
                    assert tokens_of(update) == expected[mine.pop(update.request_id)]
                    finished += 1
        if number in (2_000, 9_990):
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert finished > 9_500
    assert not mine
    assert sizes[1] < sizes[0] + 100_000, sizes
