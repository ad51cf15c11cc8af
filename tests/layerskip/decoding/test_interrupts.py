"""Exceptions at any moment of a call: no request, token, update or slot is lost, none comes twice."""

from __future__ import annotations

import gc
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from gpus import FakeGPU, InOrder, graphs_on
from tiny import prompt_of, requires_native, tiny_model
from tokenizers_of import KINDS

import layerskip.decoding
from layerskip import Conversation, SamplingParams, SelfSpeculativeDecoder, Session, SharedKVCache, StopStrings
from layerskip.decoding import cuda_graphs
from tools.soak import SLOTS, WAITING, Interrupted, Signals, Soak

pytestmark = [pytest.mark.usefixtures("one_thread"), requires_native]
DECODING = str(Path(layerskip.decoding.__file__).parent)
MODES = tuple(module.__file__ for module in (torch.autograd.grad_mode, torch.utils._contextlib))
VISITS = (1, 2, 5, 13)


class EveryPlace:
    """Raises `Interrupted` at the n-th visit of every place in decoding/ where CPython handles signals.

    That is after the call of a function in C, and where a function in Python begins. (It is also where a loop jumps
    back; the loops there call something.) Also in torch's own Python code that changes autograd's modes: calls leave
    them as they were. What a fake GPU does in its time is not interrupted. No garbage is collected meanwhile: that
    would call `__del__` of another test's objects, where CPython drops an exception.
    """

    def __init__(self, visit: int, gpu: FakeGPU | None = None) -> None:
        self._visit, self._gpu, self._visits, self.raised = visit, gpu, Counter(), 0

    def _profile(self, frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if self._gpu is not None and self._gpu.busy:
            return
        if code.co_name == "<genexpr>" or not code.co_filename.startswith((DECODING, *MODES)):
            return
        if event in ("call", "c_return"):
            place = code, frame.f_lasti, event
            self._visits[place] += 1
            if self._visits[place] == self._visit:
                self.raised += 1
                raise Interrupted  # which also ends the profiling

    @contextmanager
    def __call__(self) -> Iterator[None]:
        gc.disable()
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            gc.enable()
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()

    def until_done(self, call: Callable[[], Any], check: Callable[[], None] = lambda: None) -> Any:
        """Call until no place interrupts it."""
        while True:
            with suppress(Interrupted), self():
                return call()
            check()


@pytest.fixture(scope="module")
def decoder():
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4)


@pytest.fixture
def gpu(monkeypatch) -> FakeGPU:
    """Decoders that are made from now on record their rounds."""
    gpu = FakeGPU()
    monkeypatch.setattr(cuda_graphs, "for_device", lambda device: graphs_on(gpu))
    return gpu


def alone(decoder, tokens, count, **options) -> tuple[list[int], str]:
    out = decoder.generate([tokens], count, **options)
    return out.new_tokens[0].tolist(), out.reasons[0]


def fails_after_five(tokens: list[int]) -> bool:
    if len(tokens) > 5:
        raise OSError("more than five")
    return False


class Requests:
    """Random requests of a session, whose every call may be interrupted, and what became of them.

    Prompts share beginnings; requests are retained, continued, released, cancelled and removed; rules stop or fail.
    """

    OPTIONS = (
        {},
        {"strategy": "autoregressive"},
        {"sampling": SamplingParams(0.8, seed=3)},
        {"sampling": SamplingParams(0.9, top_k=20, repetition_penalty=1.2, seed=4)},
        {"draft_source": "ngram"},
        {"draft_source": "ngram", "sampling": SamplingParams(0.8, seed=3)},
        {"should_stop": lambda tokens: len(tokens) == 7},
        {"should_stop": fails_after_five},
        {"logits_processor": lambda history, logits: logits.roll(len(history))},
    )

    def __init__(self, session: Session, seed: int, places: EveryPlace) -> None:
        self.session, self.places, self.chance = session, places, random.Random(seed)
        self.asked: dict[int, tuple[list[int], dict]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.last: dict[int, Any] = {}

    def call(self, method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call the session; None if that was interrupted."""
        with suppress(Interrupted), self.places():
            return method(*args, **named)

    def add(self, options: dict[str, Any]) -> None:
        chance, session = self.chance, self.session
        kept = chance.choice([None, *(one for one in session.kept if one in self.last)])
        before = prompt_of(40, 1)[0, : chance.randint(0, 40)].tolist()
        if kept is not None:
            before = self.last[kept].output.sequences[0].tolist()
        new = prompt_of(chance.randint(1, 15), chance.randint(0, 3))[0].tolist()
        named = {"eos_token_id": 35, "keep": chance.random() < 0.6, **options}
        if len(before) + len(new) > 120:
            kept, before = None, []
        number = len(session)
        while (one := self.call(session.add, new if kept is not None else before + new, 12,
                                continue_from=kept, **named)) is None:  # fmt: skip
            assert len(session) == number, "a call that raises adds nothing"
        self.asked[one] = before + new, {name: value for name, value in named.items() if name != "keep"}

    def step(self) -> None:
        for update in self.call(self.session.step) or []:
            one = update.request_id
            assert one not in self.last, "nothing follows the last update"
            assert update.tokens or update.finished
            assert len(update.drafted) == len(update.tokens)
            self.tokens.setdefault(one, []).extend(update.tokens)
            if update.finished:
                self.last[one] = update

    def end_one(self) -> None:
        """Cancel, remove or release a request; again if that was interrupted."""
        open_ones = [one for one in self.asked if one not in self.last]
        if open_ones and self.chance.random() < 0.1:
            one, end = self.chance.choice(open_ones), self.chance.choice((self.session.cancel, self.session.remove))
            for _ in range(50):
                with suppress(ValueError):
                    self.call(end, one)
            if end == self.session.remove:
                del self.asked[one]
                self.tokens.pop(one, None)
        if self.session.kept and self.chance.random() < 0.1:
            one = self.chance.choice(self.session.kept)
            while one in self.session.kept:
                self.call(self.session.release, one)

    def run(self) -> None:
        for options in self.chance.sample(self.OPTIONS, len(self.OPTIONS)):
            self.add(options)
            for _ in range(self.chance.randint(0, 3)):
                self.step()
                self.end_one()
        for _ in range(5000):
            if not len(self.session):
                return
            self.step()
        raise AssertionError(f"{len(self.session)} requests did not end")

    def check(self, decoder: SelfSpeculativeDecoder) -> None:
        scheduler = self.session._scheduler
        assert self.last.keys() == self.asked.keys()
        slots = [*scheduler.free_slots, *(one.slot for one in scheduler.retained.values())]
        assert sorted(slots) == list(range(len(scheduler.slots)))
        for one, (whole, options) in self.asked.items():
            update, given = self.last[one], self.tokens[one]
            assert update.output.new_tokens[0].tolist() == given
            assert update.output.drafted.shape == update.output.new_tokens.shape
            fails = options.get("should_stop") is fails_after_five
            if fails:
                options = {name: value for name, value in options.items() if name != "should_stop"}
            expected, reason = alone(decoder, whole, 12, **options)
            if fails and len(expected) > 5 and expected[5] != 35:  # no rule is asked about an EOS token
                expected, reason = expected[:5], "error"
            assert isinstance(update.error, OSError) == (update.reason == "error")
            if update.reason == "cancelled":
                assert given == expected[: len(given)]
            else:
                assert (given, update.reason) == (expected, reason)


@pytest.mark.parametrize("visit", VISITS)
def test_interrupts_at_every_place(decoder, visit):
    places = EveryPlace(visit)
    requests = Requests(decoder.open_session(2, max_seq_len=150, prompt_tokens_per_step=5), visit, places)
    requests.run()
    assert places.raised > 100
    requests.check(decoder)


@pytest.mark.parametrize("visit", VISITS)
def test_interrupts_at_every_place_beside_recorded_rounds(gpu, visit):
    places, device_decoder = EveryPlace(visit, gpu), SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4)
    requests = Requests(device_decoder.open_session(3, max_seq_len=150, prompt_tokens_per_step=None), visit, places)
    with pytest.warns(UserWarning, match="which a CUDA graph cannot record"), InOrder(gpu):
        requests.run()
    assert places.raised > 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "for_device", lambda device: None)
        requests.check(SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4))


def test_an_interrupt_where_a_rule_ends_a_request(decoder):
    """The seventh visit of the place where a token is appended."""
    places, got = EveryPlace(7), []
    session = decoder.open_session(1, max_seq_len=60)
    session.add(prompt_of(4), 20, eos_token_id=[], should_stop=lambda tokens: len(tokens) == 7)
    while len(session):
        got += places.until_done(session.step)
    assert got[-1].reason == "stop"
    tokens = [token for update in got for token in update.tokens]
    assert tokens == alone(decoder, prompt_of(4)[0], 7, eos_token_id=[])[0]


def test_a_retained_request_is_evicted_before_its_slot_is_written(decoder, monkeypatch):
    session, copy_prefix = decoder.open_session(2, max_seq_len=60), SharedKVCache.copy_prefix
    for seed in range(2):
        session.add(prompt_of(20, seed), 4, eos_token_id=[], keep=True)
        finish(session, {})

    def interrupted(*args: Any) -> None:
        copy_prefix(*args)
        raise Interrupted

    longer = torch.cat([prompt_of(20, 1), prompt_of(5, 7)], 1)
    removed = session.add(longer, 4, eos_token_id=[])
    monkeypatch.setattr(SharedKVCache, "copy_prefix", interrupted)
    with pytest.raises(Interrupted):
        session.step()
    monkeypatch.undo()
    session.remove(removed)
    assert session.kept == (1,)
    again = session.add(torch.cat([prompt_of(20, 0), prompt_of(5, 7)], 1), 8, eos_token_id=[])
    whole = [*prompt_of(20, 0)[0].tolist(), *prompt_of(5, 7)[0].tolist()]
    assert finish(session, {})[again] == alone(decoder, whole, 8, eos_token_id=[])[0]


def test_signals_at_random_moments():
    """SIGINT and SIGTERM, whose handlers raise; `tools.soak` compares every request."""
    with Signals(seconds=0.003) as signals:
        soak = Soak(7, interrupts=signals)
        reached = soak.run(minutes=1, requests=sys.maxsize, interrupts=300)
    assert reached.interrupts >= 300
    assert reached.compared + reached.removed == reached.requests > SLOTS + WAITING


@pytest.mark.parametrize("visit", [1, 4])
def test_an_interrupted_call_of_generate(decoder, visit):
    prompts, places = [prompt_of(4)[0], prompt_of(70, 1)[0]], EveryPlace(visit)
    expected = decoder.generate(prompts, 12, eos_token_id=[]).sequences
    out = places.until_done(lambda: decoder.generate(prompts, 12, eos_token_id=[]))
    assert torch.equal(out.sequences, expected)
    assert places.raised > 20
    assert torch.equal(decoder.generate(prompts, 12, eos_token_id=[]).sequences, expected)


@pytest.mark.parametrize("visit", [1, 4])
def test_an_interrupted_turn_of_a_conversation(decoder, visit):
    places, chat = EveryPlace(visit), Conversation(decoder, max_seq_len=120)
    for turn in range(3):
        before, prompt = list(chat.tokens), prompt_of(9, turn)

        def unchanged(before: list[int] = before) -> None:
            assert chat.tokens == before

        out = places.until_done(lambda: chat.generate(prompt, 12, eos_token_id=[]), unchanged)  # noqa: B023
        whole = before + prompt[0].tolist()
        assert chat.tokens == out.sequences[0].tolist() == whole + alone(decoder, whole, 12, eos_token_id=[])[0]
    assert places.raised > 20


def test_a_streamer_that_fails_does_not_end_a_conversation(decoder):
    class Broken:
        def __init__(self, at: int) -> None:
            self.left = at

        def put(self, value: torch.Tensor) -> None:
            self.left -= 1
            if not self.left:
                raise OSError("broken pipe")

        def end(self) -> None: ...

    chat = Conversation(decoder, max_seq_len=60)
    for at in (1, 2, 3):
        with pytest.raises(OSError, match="broken pipe"):
            chat.generate(prompt_of(5), 12, Broken(at), eos_token_id=[])
        assert chat.tokens == []
    out = chat.generate(prompt_of(5), 12, eos_token_id=[])
    assert out.new_tokens[0].tolist() == alone(decoder, prompt_of(5)[0], 12, eos_token_id=[])[0]


@pytest.mark.parametrize("leave", [lambda text: text.close(), lambda text: text.throw(Interrupted)])
def test_a_stream_that_is_left_leaves_the_decoder_as_it_was(decoder, leave):
    tokenizer = KINDS["byte_level"]()
    whole = "".join(decoder.stream(prompt_of(7), 24, tokenizer=tokenizer, eos_token_id=[]))
    text = decoder.stream(prompt_of(7), 24, tokenizer=tokenizer, eos_token_id=[])
    first = next(text)
    with suppress(Interrupted):
        leave(text)
    with pytest.raises(StopIteration):
        next(text)
    assert whole.startswith(first)
    assert "".join(decoder.stream(prompt_of(7), 24, tokenizer=tokenizer, eos_token_id=[])) == whole


@pytest.mark.parametrize("visit", [1, 4])
def test_an_interrupted_stream(decoder, visit):
    tokenizer, places = KINDS["byte_level"](), EveryPlace(visit)
    options = {"tokenizer": tokenizer, "eos_token_id": [], "stop_strings": "no such text"}
    whole = "".join(decoder.stream(prompt_of(7), 24, **options))
    assert places.until_done(lambda: "".join(decoder.stream(prompt_of(7), 24, **options))) == whole
    assert places.raised > 20


def finish(session: Session, got: dict[int, list[int]]) -> dict[int, list[int]]:
    while len(session):
        for update in session.step():
            got.setdefault(update.request_id, []).extend(update.tokens)
    return got


@pytest.mark.parametrize("leave", [lambda run: run.close(), lambda run: run.throw(Interrupted)])
def test_updates_that_a_left_run_has_not_given_come_with_the_next_step(decoder, leave):
    session = decoder.open_session(3, max_seq_len=60)
    ids = [session.add(prompt_of(4, seed), 12, eos_token_id=[]) for seed in range(3)]
    run, got = session.run(), {}
    for _ in range(4):  # one of the second step
        update = next(run)
        got.setdefault(update.request_id, []).extend(update.tokens)
    with suppress(Interrupted):
        leave(run)
    for one, seed in zip(ids, range(3), strict=True):
        assert finish(session, got)[one] == alone(decoder, prompt_of(4, seed)[0], 12, eos_token_id=[])[0]


def test_a_run_that_raises_an_error_keeps_the_other_updates(decoder):
    def fails(tokens):
        raise OSError("at the first token")

    session, got = decoder.open_session(3, max_seq_len=60), {}
    session.add(prompt_of(4, 9), 12, should_stop=fails)
    ids = [session.add(prompt_of(4, seed), 12, eos_token_id=[]) for seed in range(2)]
    with pytest.raises(OSError, match="at the first token"):
        next(session.run())  # of the first step's three updates
    for update in session.run():
        got.setdefault(update.request_id, []).extend(update.tokens)
    assert set(got) == set(ids)
    for one, seed in zip(ids, range(2), strict=True):
        assert got[one] == alone(decoder, prompt_of(4, seed)[0], 12, eos_token_id=[])[0]


def test_a_second_thread_is_refused_while_a_call_runs(decoder):
    entered, proceed = Event(), Event()

    def waits(tokens):
        entered.set()
        proceed.wait(20)
        return False

    session, got = decoder.open_session(2, max_seq_len=60), {}
    first = session.add(prompt_of(4), 12, eos_token_id=[], should_stop=waits)
    thread = Thread(target=lambda: got.update(finish(session, {})), name="the first one")
    thread.start()
    assert entered.wait(20)
    calls = (
        session.step,
        lambda: session.add([1, 2], 3),
        lambda: next(session.run()),
        lambda: session.cancel(first),
        lambda: session.remove(first),
        lambda: session.release(first),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="in use by the thread 'the first one': one thread at a time"):
            call()
    proceed.set()
    thread.join()
    assert got == {first: alone(decoder, prompt_of(4)[0], 12, eos_token_id=[])[0]}
    second = session.add(prompt_of(4), 12, eos_token_id=[])
    assert finish(session, {}) == {second: got[first]}


def test_a_stop_rule_that_was_interrupted_gives_the_same_answer():
    """Wherever in its reading of a token that was."""
    tokenizer, prompt = KINDS["byte_level"](), prompt_of(7)[0].tolist()
    tokens = list(range(40, 60))
    stop = tokenizer.decode(tokens)[9:12]
    whole = StopStrings(tokenizer, stop, prompt)
    expected = [whole(tokens[:count]) for count in range(1, 21)]
    assert True in expected[5:]
    for moment in range(1, 40):
        calls = 0

        class Interrupting:
            def __getattr__(self, name: str) -> Any:
                return getattr(tokenizer, name)

            def decode(self, *args: Any, **named: Any) -> str:
                nonlocal calls
                calls += 1
                if calls == moment:  # noqa: B023
                    raise Interrupted
                return tokenizer.decode(*args, **named)

        rule, answers = StopStrings(Interrupting(), stop, prompt), []
        while len(answers) < 20:
            with suppress(Interrupted):
                answers.append(rule(tokens[: len(answers) + 1]))
        assert answers == expected
