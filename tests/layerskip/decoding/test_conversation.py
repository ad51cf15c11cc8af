"""Requests that go on from what the cache holds: turns of a conversation, shared beginnings."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import prompt_of, requires_native, tiny_model

from layerskip import Conversation, SamplingParams, SelfSpeculativeDecoder
from layerskip_kernels import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4)


def outputs(session, steps: int = 300) -> dict:
    done = {}
    for _ in range(steps):
        if not len(session):
            return done
        for update in session.step():
            assert update.error is None
            if update.finished:
                done[update.request_id] = update.output
    raise AssertionError(f"{len(session)} requests did not end")


def scratch(decoder, tokens, new_tokens, **options) -> list[int]:
    """The continuation of all tokens, by a decoder that has seen nothing."""
    return decoder.generate([tokens], new_tokens, **options).new_tokens[0].tolist()


@requires_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", [None, SamplingParams(0.8, seed=5), SamplingParams(repetition_penalty=1.2)])
def test_a_turn_reads_its_own_tokens_only_and_equals_the_whole_prompt(dtype, params):
    decoder = SelfSpeculativeDecoder(tiny_model("qwen3", dtype, upper="weak"), 1, 4)
    chat, whole = Conversation(decoder, max_seq_len=200), []
    for turn, (length, count) in enumerate([(30, 20), (7, 15), (40, 10), (1, 12)]):
        before, prompt = len(whole), prompt_of(length, turn)
        out = chat.generate(prompt, count, sampling=params, eos_token_id=[])
        whole += prompt[0].tolist()
        assert out.new_tokens[0].tolist() == scratch(decoder, whole, count, sampling=params, eos_token_id=[])
        whole += out.new_tokens[0].tolist()
        assert out.sequences[0].tolist() == chat.tokens == whole
        assert out.stats.reused == max(0, before - 1), "all but the last token, which no round had read"


@requires_native
def test_undo_and_failure_of_a_turn(decoder):
    chat = Conversation(decoder)
    chat.generate(prompt_of(20), 10, eos_token_id=[])
    first = list(chat.tokens)
    chat.generate(prompt_of(5, 1), 10, eos_token_id=[])
    chat.tokens = first

    def fails(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.generate(prompt_of(3, 2), 10, should_stop=fails)
    assert chat.tokens == first
    out = chat.generate(prompt_of(5, 3), 10, eos_token_id=[])
    assert out.new_tokens[0].tolist() == scratch(decoder, first + prompt_of(5, 3)[0].tolist(), 10, eos_token_id=[])


# A conversation that exceeds the context

SYSTEM = prompt_of(8, 90)[0].tolist()


@pytest.mark.parametrize("streamed", [False, True])
def test_the_oldest_turns_are_dropped_and_the_system_prompt_stays(decoder, streamed):
    chat = Conversation(decoder, max_seq_len=70, system=SYSTEM, truncation="oldest_turns")
    assert (chat.tokens, chat.num_turns) == (SYSTEM, 0)
    turns: list[list[int]] = []
    for number, length in enumerate((10, 6, 3, 20, 5)):
        prompt = prompt_of(length, number)[0].tolist()
        while turns and len(SYSTEM) + sum(map(len, turns)) + length + 10 > 70:
            del turns[0]
        expected = scratch(decoder, [*SYSTEM, *chain(*turns), *prompt], 10, eos_token_id=[])
        if streamed:
            updates = list(chat.updates(prompt, 10, eos_token_id=[]))
            assert [token for update in updates for token in update.tokens] == expected
        else:
            assert chat.generate(prompt, 10, eos_token_id=[]).new_tokens[0].tolist() == expected
        turns.append(prompt + expected)
        assert chat.tokens == [*SYSTEM, *chain(*turns)]
        assert chat.num_turns == len(turns)
    assert len(turns) < 5, "else nothing was dropped"


def test_without_a_rule_a_turn_that_does_not_fit_is_an_error(decoder):
    chat = Conversation(decoder, max_seq_len=40)
    chat.generate(prompt_of(10), 10, eos_token_id=[])
    before = list(chat.tokens)
    with pytest.raises(
        ValueError, match="a prompt of 35 tokens and max_new_tokens=10 make 45, more than max_seq_len=40"
    ):
        chat.generate(prompt_of(15), 10)
    assert chat.tokens == before
    assert chat.num_turns == 1


def test_a_turn_that_fits_without_any_other_neither_is_an_error(decoder):
    chat = Conversation(decoder, max_seq_len=40, system=SYSTEM, truncation="oldest_turns")
    chat.generate(prompt_of(5), 10, eos_token_id=[])
    before = list(chat.tokens)
    with pytest.raises(ValueError, match="a prompt of 38 tokens and max_new_tokens=10 make 48"):
        chat.generate(prompt_of(30), 10)
    assert chat.tokens == before


def test_turns_without_a_limit_leave_a_quarter_for_the_answer(decoder):
    chat = Conversation(decoder, max_seq_len=40, truncation="oldest_turns")
    chat.generate(prompt_of(14), 10, eos_token_id=[])
    out = chat.generate(prompt_of(6, 1), None, eos_token_id=[])
    assert (out.stats.prompt_tokens, chat.num_turns) == (30, 2), "the first turn could stay"
    out = chat.generate(prompt_of(6, 2), None, eos_token_id=[])
    assert (out.stats.prompt_tokens, out.stats.new_tokens, chat.num_turns) == (22, 18, 2)


def test_turns_are_taken_back(decoder):
    chat = Conversation(decoder, system=SYSTEM)
    with pytest.raises(ValueError, match="no turn to take back"):
        chat.undo()
    chat.generate(prompt_of(6), 5, eos_token_id=[])
    chat.tokens = [*chat.tokens, 7]  # belongs to the turn
    first = list(chat.tokens)
    chat.generate(prompt_of(6, 1), 5, eos_token_id=[])
    chat.undo()
    assert (chat.tokens, chat.num_turns) == (first, 1)
    out = chat.generate(prompt_of(4, 2), 5, eos_token_id=[])
    assert out.new_tokens[0].tolist() == scratch(decoder, first + prompt_of(4, 2)[0].tolist(), 5, eos_token_id=[])
    chat.undo()
    chat.undo()
    assert (chat.tokens, chat.num_turns) == (SYSTEM, 0)


def test_leaving_the_updates_takes_the_turn_back(decoder):
    chat = Conversation(decoder, system=SYSTEM)
    for _ in chat.updates(prompt_of(6), 50, eos_token_id=[]):
        break
    assert (chat.tokens, chat.num_turns) == (SYSTEM, 0)
    out = chat.generate(prompt_of(4), 5, eos_token_id=[])
    assert out.new_tokens[0].tolist() == scratch(decoder, SYSTEM + prompt_of(4)[0].tolist(), 5, eos_token_id=[])


def test_what_a_conversation_cannot_be(decoder):
    with pytest.raises(ValueError, match="truncation must be one of error, oldest_turns, got 'newest'"):
        Conversation(decoder, truncation="newest")
    with pytest.raises(ValueError, match="a prompt of 8 tokens leaves no room for new ones in max_seq_len=8"):
        Conversation(decoder, max_seq_len=8, system=SYSTEM)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        Conversation(decoder, truncation="oldest_turns").updates([1], 0)


@requires_native
def test_requests_continue_retained_requests(decoder):
    session = decoder.open_session(2, max_seq_len=120)
    ids = [session.add(prompt_of(20 + seed, seed), 10, eos_token_id=[], keep=True) for seed in range(2)]
    first = outputs(session)
    assert session.kept == tuple(ids)
    follow = [session.add(prompt_of(5, 7), 10, eos_token_id=[], continue_from=one, keep=True) for one in ids[::-1]]
    second = outputs(session)
    for one, after in zip(ids[::-1], follow, strict=True):
        whole = first[one].sequences[0].tolist() + prompt_of(5, 7)[0].tolist()
        assert second[after].new_tokens[0].tolist() == scratch(decoder, whole, 10, eos_token_id=[])
        assert second[after].stats.reused == len(whole) - 6
        assert second[after].stats.prompt_tokens == len(whole)
    assert set(session.kept) == set(follow)
    with pytest.raises(ValueError, match=rf"request {ids[0]} is not kept, these are: \["):
        session.add([1], 4, continue_from=ids[0])
    session.release(follow[0])
    assert session.kept == (follow[1],)
    with pytest.raises(ValueError, match=f"request {follow[0]} is not kept"):
        session.release(follow[0])


def kept_requests(session, count):
    """Requests of different prompts, one after the other, which keep their slots; their ids."""
    ids = []
    for seed in range(count):
        ids.append(session.add(prompt_of(20, seed), 4, eos_token_id=[], keep=True))
        outputs(session)
    return ids


@requires_native
def test_retained_slots_are_evicted_least_recently_used_first(decoder):
    session = decoder.open_session(2, max_seq_len=120)
    ids = kept_requests(session, 2)
    again = session.add(prompt_of(30, 0)[:, :20].clone(), 4, eos_token_id=[])
    assert session.kept == tuple(ids), "one that waits takes nothing"
    outputs(session)
    assert session.kept == (ids[1],)
    last = session.add(prompt_of(9, 5), 4, eos_token_id=[], keep=True)
    outputs(session)
    assert session.kept[-1] == last
    assert again not in session.kept


@requires_native
def test_copying_a_prefix_counts_as_use(decoder):
    session = decoder.open_session(3, max_seq_len=120)
    ids = kept_requests(session, 2)
    again = session.add(prompt_of(20, 0), 4, eos_token_id=[])
    assert outputs(session)[again].stats.reused == 19
    assert session.kept == (ids[1], ids[0])


@requires_native
@pytest.mark.parametrize("donor", ["kept", "running", "half read"])
def test_a_shared_prefix_is_read_once(decoder, donor):
    system = prompt_of(60, 9)
    prompts = [torch.cat([system, prompt_of(11, seed)], 1) for seed in range(3)]
    session = decoder.open_session(3, max_seq_len=160, prompt_tokens_per_step=30)
    session.add(prompt_of(3), 120, eos_token_id=[])
    session.step()
    count = {"kept": 2, "running": 60, "half read": 60}[donor]
    first = session.add(prompts[0], count, eos_token_id=[], keep=True)
    for _ in range({"half read": 1}.get(donor, 6)):
        session.step()
    assert (first in session.kept) == (donor == "kept")
    second = session.add(prompts[1], 8, eos_token_id=[])
    done = outputs(session)
    assert done[second].stats.reused == 60
    assert done[second].new_tokens[0].tolist() == scratch(decoder, prompts[1][0].tolist(), 8, eos_token_id=[])


@requires_native
def test_the_same_prompt_again_reads_its_last_token_only(decoder):
    out = decoder.generate([prompt_of(80)[0]] * 3, 10, eos_token_id=[])
    assert [row.reused for row in out.per_sequence] == [0, 79, 79]
    assert out.stats.reused == 158
    assert out.new_tokens.unique(dim=0).shape[0] == 1
    assert out.new_tokens[0].tolist() == scratch(decoder, prompt_of(80)[0].tolist(), 10, eos_token_id=[])


@requires_native
def test_slots_of_fewer_layers_are_not_reused(decoder):
    session = decoder.open_session(3, max_seq_len=120)
    early = {"strategy": "early_exit", "exit_layer": 2, "eos_token_id": []}
    session.add(prompt_of(70), 10, keep=True, **early)
    outputs(session)
    deep = session.add(prompt_of(70), 10, eos_token_id=[], keep=True)
    assert outputs(session)[deep].stats.reused == 0
    shallow = session.add(prompt_of(70), 10, **early)
    done = outputs(session)[shallow]
    assert done.stats.reused == 69
    assert done.new_tokens[0].tolist() == scratch(decoder, prompt_of(70)[0].tolist(), 10, **early)


def test_torch_matmuls_reuse_whole_chunks_only(decoder, monkeypatch):
    """Their rounding depends on the number of rows, so decoded tokens and those behind the last cut are read again."""
    monkeypatch.setattr("layerskip.decoding.scheduler.TORCH_ROWS", 16)
    with use_backend("reference"):
        chat = Conversation(decoder, max_seq_len=120)
        chat.generate(prompt_of(40), 10, eos_token_id=[])
        whole = chat.tokens + prompt_of(5, 1)[0].tolist()
        out = chat.generate(prompt_of(5, 1), 10, eos_token_id=[])
        assert out.stats.reused == 32
        assert out.new_tokens[0].tolist() == scratch(decoder, whole, 10, eos_token_id=[])


@requires_native
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), slots=st.integers(1, 4), budget=st.sampled_from((1, 5, 64, None)))
def test_random_requests_get_the_tokens_they_get_alone(decoder, seed, slots, budget):
    """Prompts with common beginnings, kept and continued requests, cancels at any moment."""
    chance, system = random.Random(seed), prompt_of(40, 1)[0].tolist()
    session = decoder.open_session(slots, max_seq_len=150, prompt_tokens_per_step=budget)
    wholes, options, done = {}, {}, {}
    for _ in range(400):
        if len(options) < 10 and chance.random() < 0.5:
            kept = chance.choice([None, *(one for one in session.kept if one in done)])
            before = system[: chance.randint(0, 40)] if kept is None else done[kept].sequences[0].tolist()
            new = prompt_of(chance.randint(1, 15), chance.randint(0, 3))[0].tolist()
            if len(before) + len(new) > 130:
                continue
            given = {"strategy": chance.choice(("self_speculative", "autoregressive")), "eos_token_id": 35}
            given["sampling"] = chance.choice((None, SamplingParams(0.7, seed=3)))
            sent = new if kept is not None else before + new
            one = session.add(sent, 12, keep=chance.random() < 0.7, continue_from=kept, **given)
            wholes[one], options[one] = before + new, given
        for update in session.step():
            assert update.error is None
            if update.finished:
                done[update.request_id] = update.output
        going = [one for one in options if one not in done]
        if going and chance.random() < 0.05:
            session.cancel(chance.choice(going))
        if session.kept and chance.random() < 0.05:
            session.release(chance.choice(session.kept))
        if len(options) == 10 and not len(session):
            break
    assert len(done) == 10
    assert len(session._scheduler.free_slots) + len(session.kept) == slots
    for one, output in done.items():
        expected = scratch(decoder, wholes[one], 12, **options[one])
        got = output.new_tokens[0].tolist()
        assert got == (expected[: len(got)] if output.reasons == ("cancelled",) else expected)
