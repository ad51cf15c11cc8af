"""What goes wrong in a session: interrupts, prompts that cannot be read, tokens that nothing may draft."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, prompt_of, tiny_model

from layerskip import DraftHead, SamplingParams, SelfSpeculativeDecoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4)


def alone(decoder, prompt, new_tokens=20, **options) -> list[int]:
    return decoder.generate(prompt.view(1, -1), new_tokens, strategy="autoregressive", **options).new_tokens[0].tolist()


def interrupting(moments):
    """A rule that never stops, and is interrupted at these numbers of tokens, each once."""

    def rule(tokens):
        if len(tokens) in moments:
            moments.remove(len(tokens))
            raise KeyboardInterrupt
        return False

    return rule


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("moment", [1, 4, 9, 20])
def test_a_session_continues_after_an_interrupt(decoder, moment, penalty):
    """In the middle of a round: nothing is lost or wrong, whoever was or was not written down before it."""
    calls = 0

    def interrupted(tokens):
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        return False

    params = SamplingParams(repetition_penalty=penalty)
    session, tokens, last = decoder.open_session(3, max_seq_len=64), {}, {}
    for index in range(3):
        rule = interrupted if index == 1 else None
        session.add(prompt_of(4, index), 20, should_stop=rule, sampling=params)
    interrupts = 0
    while len(session):
        try:
            updates = session.step()
        except KeyboardInterrupt:
            interrupts += 1
            continue
        for update in updates:
            tokens.setdefault(update.request_id, []).extend(update.tokens)
            last[update.request_id] = update
    assert interrupts == 1
    for index in range(3):
        expected = alone(decoder, prompt_of(4, index), sampling=params)
        assert tokens[index] == expected
        assert last[index].output.new_tokens[0].tolist() == expected


def test_a_removed_request_has_no_update_of_an_interrupted_step_either(decoder):
    session, interrupts = decoder.open_session(2, max_seq_len=64), [9]
    ids = [session.add(prompt_of(4), 20), session.add(prompt_of(4), 20, should_stop=interrupting(interrupts))]
    with suppress(KeyboardInterrupt):
        while interrupts:
            session.step()
    session.remove(ids[0])
    assert {update.request_id for update in session.step()} == {ids[1]}


def test_a_request_that_ended_in_an_interrupted_step_can_be_removed(decoder):
    """Its last update is still to come; it then does not."""
    session, interrupts = decoder.open_session(2, max_seq_len=64), [7]
    ids = [session.add(prompt_of(4), 7), session.add(prompt_of(4), 20, should_stop=interrupting(interrupts))]
    with suppress(KeyboardInterrupt):
        while interrupts:
            session.step()
    assert len(session) == 2
    session.remove(ids[0])
    assert len(session) == 1
    assert {update.request_id for update in session.step()} == {ids[1]}
    with pytest.raises(ValueError, match="has not ended"):
        session.remove(ids[0])


def test_drafts_before_a_fault_count_as_accepted():
    """A rule that raises in the middle of a round: the tokens before it stay emitted."""
    decoder, fault = SelfSpeculativeDecoder(tiny_model(upper="silent"), 1, 4), []  # every draft is accepted

    def faulty(tokens):
        if len(tokens) == 8:
            fault.append(len(tokens))
            raise ValueError("enough")
        return False

    session = decoder.open_session(1, max_seq_len=64)
    session.add(prompt_of(4), 20, should_stop=faulty)
    updates = []
    while len(session):
        updates += session.step()
    output = updates[-1].output
    assert (updates[-1].reason, fault) == ("error", [8])
    assert output.stats.accepted == int(output.drafted.sum()) > 4
    assert sum(count.accepted for count in output.stats.by_source.values()) == output.stats.accepted
    assert sum(one.accepted for row in output.stats.by_position.values() for one in row) == output.stats.accepted


def test_an_interrupted_round_is_continued(decoder):
    """Not repeated from where it was: another round would draw with other noise."""
    params, interrupts = SamplingParams(0.9, seed=3), [2, 5, 6, 7, 11, 20]
    session = decoder.open_session(2, max_seq_len=64)
    session.add(prompt_of(4), 20, should_stop=interrupting(interrupts), sampling=params)
    updates = []
    while len(session):
        with suppress(KeyboardInterrupt):
            updates += session.step()
    assert not interrupts
    expected = decoder.generate(prompt_of(4).view(1, -1), 20, sampling=params)
    assert updates[-1].output.new_tokens.equal(expected.new_tokens)
    assert updates[-1].output.stats.records == expected.stats.records


def test_a_rule_that_was_interrupted_is_asked_again(decoder):
    """For the same token, whose answer is not lost."""
    asked, session = [], decoder.open_session(1, max_seq_len=64)

    def interrupted_where_it_ends(tokens):
        asked.append(len(tokens))
        if asked.count(5) == 1 and len(tokens) == 5:
            raise KeyboardInterrupt
        return len(tokens) == 5

    session.add(prompt_of(4), 20, should_stop=interrupted_where_it_ends)
    updates = []
    while len(session):
        with suppress(KeyboardInterrupt):
            updates += session.step()
    assert asked == [1, 2, 3, 4, 5, 5]
    assert (updates[-1].reason, updates[-1].output.new_tokens[0].tolist()) == ("stop", alone(decoder, prompt_of(4))[:5])


def test_a_prompt_that_cannot_be_read_ends_its_own_request(decoder, monkeypatch):
    session = decoder.open_session(2, max_seq_len=64)
    session.add(prompt_of(4), 20)
    given = session.step()[0].tokens
    session.add(prompt_of(5), 20)
    third = session.add(prompt_of(6), 20)
    read, second = session._scheduler.prefill.run, 1

    def failing(requests, limit):
        if any(len(request.prompt_tokens) == 5 for request in requests):
            raise RuntimeError("no memory")
        return read(requests, limit)

    monkeypatch.setattr(session._scheduler.prefill, "run", failing)
    last = {}
    while len(session):
        for update in session.step():
            last[update.request_id] = update
            given += update.tokens if update.request_id == 0 else []
    assert str(last[second].error) == "no memory"
    assert last[second].reason == "error"
    assert last[second].output.new_tokens.shape == (1, 0)
    assert given == alone(decoder, prompt_of(4))
    assert last[third].output.new_tokens[0].tolist() == alone(decoder, prompt_of(6))


def only_high(history, logits):
    return torch.cat([torch.full_like(logits[:50], -math.inf), logits[50:]])


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_reduced_head_that_scores_no_allowed_token_drafts_nothing(threshold, temperature):
    """The full head still finds the token; other sequences of the round go on drafting."""
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 3, draft_head=DraftHead(range(10), VOCABULARY))
    params = SamplingParams(temperature, seed=3, logit_bias={0: 0.5})
    prompts, hooks = [prompt_of(5), prompt_of(6, 1)], [only_high, None]
    out = decoder.generate(prompts, 12, sampling=params, logits_processor=hooks, draft_threshold=threshold)
    assert out.per_sequence[0].drafted == 0
    assert int(out.new_tokens[0].min()) >= 50
    if temperature == 0:
        for prompt, hook, row in zip(prompts, hooks, out.new_tokens.tolist(), strict=True):
            assert row == alone(decoder, prompt, 12, sampling=params, logits_processor=hook)


def test_a_rule_gets_its_own_list(decoder):
    kept = []

    def careless(tokens):
        kept.append(tokens)
        return len(kept) > 5

    out = decoder.generate(prompt_of(4).view(1, -1), 20, should_stop=careless)
    assert [len(tokens) for tokens in kept] == [1, 2, 3, 4, 5, 6]
    assert kept[-1] == out.new_tokens[0].tolist()


def test_forbidding_every_token_is_an_error(decoder):
    """The error names the likelier cause, too."""
    forbidden = SamplingParams(logit_bias=dict.fromkeys(range(VOCABULARY), -math.inf))
    with pytest.raises(FloatingPointError, match="or bias and processors forbid every token"):
        decoder.generate(prompt_of(4).view(1, -1), 5, sampling=forbidden)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 1e-40}, "temperature must be 0 or at least 1e-06, got 1e-40"),
        ({"temperature": 1e39}, r"temperature must be in \[0, 1e\+06\], got 1e\+39"),
        ({"repetition_penalty": 1e-40}, r"repetition_penalty must be in \[1e-06, 1e\+06\], got 1e-40"),
        ({"logit_bias": {3: 1e300}}, r"logit_bias\[3\] must be in \[-1e\+06, 1e\+06\], got 1e\+300"),
    ],
)
def test_parameters_that_overflow_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def test_numpy_numbers_are_accepted(decoder):
    prompt = [np.int64(token) for token in prompt_of(4).view(-1).tolist()]
    params = SamplingParams(np.float32(0.5), top_k=np.int64(3), seed=np.int64(1))
    for eos in (np.int64(3), torch.tensor(3), torch.tensor([3])):
        out = decoder.generate([prompt], np.int64(6), eos_token_id=eos, sampling=params)
        expected = SamplingParams(0.5, top_k=3, seed=1)
        assert out.sequences.equal(decoder.generate([prompt], 6, eos_token_id=3, sampling=expected).sequences)


def test_defaults_of_torch_do_not_matter(decoder):
    """Neither another default dtype nor autocast."""
    prompt, params = prompt_of(4).view(1, -1), SamplingParams(0.7, seed=1, logit_bias={3: 1.0})
    expected = decoder.generate(prompt, 9, sampling=params).sequences
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert decoder.generate(prompt, 9, sampling=params).sequences.equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder.generate(prompt, 9, sampling=params).sequences.equal(expected)


def test_too_many_speculations_are_refused(decoder):
    with pytest.raises(ValueError, match=r"num_speculations must be in 1 … 1024, got 1000000"):
        decoder.generate(prompt_of(4).view(1, -1), 3, num_speculations=10**6)


def test_a_step_after_an_interrupted_one_has_one_update_of_a_request(decoder):
    """The rest of the interrupted round and the next round come together, and nothing is lost."""
    interrupts = [3, 6]

    def interrupted(tokens):
        if len(tokens) in interrupts:
            interrupts.remove(len(tokens))
            raise KeyboardInterrupt
        return False

    session = decoder.open_session(2, max_seq_len=64)
    ids = [session.add(prompt_of(4), 20), session.add(prompt_of(5), 20, should_stop=interrupting(interrupts))]
    told = {request: [] for request in ids}
    outputs = {}
    while len(session):
        try:
            updates = session.step()
        except KeyboardInterrupt:
            continue
        assert len({update.request_id for update in updates}) == len(updates)
        for update in updates:
            told[update.request_id] += update.tokens
            outputs[update.request_id] = update.output
    assert interrupts == []
    for request in ids:
        assert told[request] == outputs[request].new_tokens[0].tolist()
        assert len(told[request]) == 20
