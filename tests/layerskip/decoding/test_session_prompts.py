"""Prompts in a session: read in pieces between rounds, shared, cancelled half-way; and a line of bounded length."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt_of, requires_native, tiny_model

from layerskip import SelfSpeculativeDecoder, SessionFullError
from layerskip_kernels import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def decoder():
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4)


@pytest.fixture
def passes(decoder, monkeypatch):
    """The passes of a prefill: the number of prompts and of tokens of each."""
    sizes = []

    def watch(name):
        read = getattr(decoder.model, name)
        monkeypatch.setattr(
            decoder.model,
            name,
            lambda tokens, *rest, **named: sizes.append(tuple(tokens.shape)) or read(tokens, *rest, **named),
        )

    watch("read")
    watch("prefill")
    return sizes


def alone(decoder, prompt, new_tokens=20, **options) -> list[int]:
    return decoder.generate(prompt, new_tokens, strategy="autoregressive", **options).new_tokens[0].tolist()


def run(session, steps: int = 500) -> dict[int, list[int]]:
    """The new tokens of every request; a session that does not end is an error."""
    tokens: dict[int, list[int]] = {}
    for _ in range(steps):
        if not len(session):
            return tokens
        for update in session.step():
            assert update.error is None
            tokens.setdefault(update.request_id, []).extend(update.tokens)
    raise AssertionError(f"{len(session)} requests did not end in {steps} steps")


@requires_native
@pytest.mark.parametrize("budget", [1, 7, 64, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_token(budget, dtype):
    decoder = SelfSpeculativeDecoder(tiny_model(dtype=dtype, upper="weak"), 1, 4)
    session = decoder.open_session(3, max_seq_len=200, prompt_tokens_per_step=budget)
    prompts = [prompt_of(length, length) for length in (5, 90, 150, 33)]
    ids = [session.add(prompt, 12, eos_token_id=[]) for prompt in prompts]
    tokens = run(session)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens[request_id] == alone(decoder, prompt, 12, eos_token_id=[])


@requires_native
def test_a_step_reads_no_more_than_its_budget_while_requests_run(decoder, passes):
    session = decoder.open_session(5, max_seq_len=200, prompt_tokens_per_step=20)
    running = session.add(prompt_of(4), 100, eos_token_id=[])
    session.step()
    del passes[:]
    others = [session.add(prompt_of(90, seed), 2, eos_token_id=[]) for seed in range(1, 5)]
    begun = []
    while len(begun) < 4:
        updates = session.step()
        assert sum(rows * tokens for rows, tokens in passes) <= 20
        assert any(update.request_id == running and update.tokens for update in updates), "nobody waits for prompts"
        begun += [
            update.request_id for update in updates if update.request_id in others and update.request_id not in begun
        ]
        del passes[:]
    assert begun == others


@requires_native
def test_the_budget_holds_when_prompts_share_a_chunk(decoder, passes):
    session = decoder.open_session(9, max_seq_len=60, prompt_tokens_per_step=5)
    session.add(prompt_of(4), 40, eos_token_id=[])
    session.step()
    prompts = [prompt_of(3, seed) for seed in range(1, 9)]
    others, tokens = [session.add(prompt, 4, eos_token_id=[]) for prompt in prompts], {}
    while any(len(tokens.get(request_id, [])) < 4 for request_id in others):
        del passes[:]
        for update in session.step():
            tokens.setdefault(update.request_id, []).extend(update.tokens)
        assert sum(rows * count for rows, count in passes) <= 5
    assert [tokens[one] for one in others] == [alone(decoder, prompt, 4, eos_token_id=[]) for prompt in prompts]


@requires_native
def test_prefill_is_unlimited_when_nothing_runs(decoder, passes):
    session = decoder.open_session(2, max_seq_len=250, prompt_tokens_per_step=1)
    session.add(prompt_of(200), 2, eos_token_id=[])
    assert session.step()[0].tokens
    assert sum(rows * tokens for rows, tokens in passes) == 200


@requires_native
def test_short_prompts_share_a_chunk(decoder, passes):
    session = decoder.open_session(4, max_seq_len=60, prompt_tokens_per_step=None)
    prompts = [prompt_of(length, length) for length in (7, 7, 9, 12)]
    prompts[1] = prompt_of(7, 99)
    ids = [session.add(prompt, 6, eos_token_id=[]) for prompt in prompts]
    tokens = run(session)
    assert passes[:3] == [(4, 7), (2, 2), (1, 3)]
    assert [tokens[one] for one in ids] == [alone(decoder, prompt, 6, eos_token_id=[]) for prompt in prompts]


@requires_native
def test_prompts_of_other_layers_take_another_chunk(decoder):
    session = decoder.open_session(2, max_seq_len=60)
    full = session.add(prompt_of(8), 6, eos_token_id=[])
    early = session.add(prompt_of(8), 6, eos_token_id=[], strategy="early_exit", exit_layer=2)
    tokens = run(session)
    assert tokens[full] == alone(decoder, prompt_of(8), 6, eos_token_id=[])
    out = decoder.generate(prompt_of(8), 6, eos_token_id=[], strategy="early_exit", exit_layer=2)
    assert tokens[early] == out.new_tokens[0].tolist()


def test_torch_matmuls_cut_prompts_at_fixed_positions(decoder, passes, monkeypatch):
    monkeypatch.setattr("layerskip.decoding.scheduler.TORCH_ROWS", 32)
    with use_backend("reference"):
        session = decoder.open_session(2, max_seq_len=200, prompt_tokens_per_step=7)
        session.add(prompt_of(4), 30, eos_token_id=[])
        session.step()
        del passes[:]
        session.add(prompt_of(101, 1), 2, eos_token_id=[])
        for expected in (32, 32, 32, 5):
            session.step()
            read = [tokens for _, tokens in passes if tokens > 1]
            assert read == [expected]
            del passes[:]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("end", ["cancel", "remove"])
@pytest.mark.parametrize("stage", ["waiting", "half read", "running", "ended"])
def test_cancelling_frees_the_slot_at_every_stage(decoder, stage, end, keep):
    session = decoder.open_session(2, max_seq_len=200, prompt_tokens_per_step=8)
    session.add(prompt_of(4), 150, eos_token_id=[])
    session.step()
    if stage == "waiting":
        session.add(prompt_of(5, 7), 150, eos_token_id=[])
        session.step()
    count = 1 if stage == "ended" else 100
    victim = session.add(prompt_of(60, 1), count, eos_token_id=[], keep=keep)
    for _ in range({"waiting": 1, "half read": 3}.get(stage, 60)):
        ended = [update.finished for update in session.step() if update.request_id == victim]
        if ended and stage in ("running", "ended"):
            break
    if stage == "ended":
        assert ended == [True]
        with pytest.raises(ValueError, match="request_id must be that of a request that has not ended"):
            getattr(session, end)(victim)
    else:
        getattr(session, end)(victim)
        assert (victim in session.kept) == (keep and end == "cancel" and stage == "running")
    later = [session.add(prompt_of(30, seed), 5, eos_token_id=[]) for seed in (2, 3, 4)]
    tokens = run(session)
    for request_id, seed in zip(later, (2, 3, 4), strict=True):
        assert tokens[request_id] == alone(decoder, prompt_of(30, seed), 5, eos_token_id=[])
    scheduler = session._scheduler
    assert sorted([*scheduler.free_slots, *(one.slot for one in scheduler.retained.values())]) == [0, 1]


def test_a_lost_slot_is_an_error(decoder):
    session = decoder.open_session(1, max_seq_len=40)
    session._scheduler.slots.clear()
    session.add(prompt_of(4), 5)
    with pytest.raises(RuntimeError, match="1 requests wait, and no slot is free or in use"):
        session.step()


def test_a_full_waiting_queue_is_an_error(decoder):
    session = decoder.open_session(2, max_seq_len=40, max_waiting=1)
    for seed in range(3):
        session.add(prompt_of(4, seed), 5, eos_token_id=[])
    with pytest.raises(SessionFullError, match="max_waiting=1 requests wait"):
        session.add(prompt_of(4, 3), 5)
    session.step()
    with pytest.raises(SessionFullError):
        session.add(prompt_of(4, 3), 5)
    assert len(run(session)) == 3
    session.add(prompt_of(4, 3), 5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_tokens_per_step": 0}, ValueError, "prompt_tokens_per_step must be at least 1, got 0"),
        ({"prompt_tokens_per_step": 1.5}, TypeError, "prompt_tokens_per_step must be an int, got 1.5"),
        ({"max_waiting": -1}, ValueError, "max_waiting must be at least 0, got -1"),
    ],
)
def test_invalid_limits(decoder, options, error, message):
    with pytest.raises(error, match=message):
        decoder.open_session(2, **options)


@requires_native
def test_an_interrupt_during_prefill_loses_nothing(decoder, monkeypatch):
    session = decoder.open_session(2, max_seq_len=200, prompt_tokens_per_step=16)
    session.add(prompt_of(4), 40, eos_token_id=[])
    session.step()
    second = session.add(prompt_of(50, 1), 8, eos_token_id=[])
    run_chunk, calls = session._scheduler.prefill.run, []

    def interrupted(*args):
        done = run_chunk(*args)
        calls.append(1)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(session._scheduler.prefill, "run", interrupted)
    tokens: dict[int, list[int]] = {}
    for _ in range(60):
        try:
            for update in session.step():
                tokens.setdefault(update.request_id, []).extend(update.tokens)
        except KeyboardInterrupt:
            continue
    assert len(session) == 0
    assert len(calls) == 4
    assert tokens[second] == alone(decoder, prompt_of(50, 1), 8, eos_token_id=[])


def test_invalid_prompt_tokens_per_step():
    decoder = SelfSpeculativeDecoder(tiny_model(), exit_layer=1)
    for wrong in (0, "often"):
        with pytest.raises((ValueError, TypeError), match=f"prompt_tokens_per_step.*{wrong}"):
            decoder.open_session(1, max_seq_len=16, prompt_tokens_per_step=wrong)
