"""A decoder that several threads call gives each the same tokens as alone, also after a fork."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
from tiny import prompt_of, requires_native, tiny_model
from tokenizers_of import KINDS

import layerskip
from layerskip import SamplingParams, SelfSpeculativeDecoder
from layerskip.models import adapt

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS, NEW, THREADS = 30, 12, 4


@pytest.fixture(scope="module")
def model():
    return tiny_model(upper="weak")


def prompts():
    return [prompt_of(2 + seed % 9, seed) for seed in range(PROMPTS)]


def in_threads(call, items, threads=THREADS):
    """``call`` of every item by every thread, all starting together, each at another item."""
    start = Barrier(threads)

    def work(first):
        start.wait()
        order = [(first * len(items) // threads + place) % len(items) for place in range(len(items))]
        done = {place: call(items[place]) for place in order}
        return [done[place] for place in range(len(items))]

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))


SAMPLED = SamplingParams(temperature=0.9, seed=11)
WAYS = {
    "speculative": {},
    "autoregressive": {"strategy": "autoregressive"},
    "exit": {"strategy": "early_exit", "exit_layer": 2},
    "sampled": {"sampling": SAMPLED},
    "processed": {"sampling": SamplingParams(temperature=0.9, top_k=20, seed=5)},
    "auto": {"exit_layer": "auto", "num_speculations": "auto"},
}


@requires_native
def test_generate_in_threads(model):
    decoder = SelfSpeculativeDecoder(model, 1, 4)
    items = [(prompt, way) for number, prompt in enumerate(prompts()) for way in [list(WAYS)[number % len(WAYS)]]]

    def call(item):
        prompt, way = item
        return decoder.generate(prompt, NEW, **WAYS[way]).sequences.tolist()

    expected = [call(item) for item in items]
    for thread in in_threads(call, items):
        assert thread == expected


@requires_native
def test_streams_and_sessions_in_threads(model):
    decoder, tokenizer = SelfSpeculativeDecoder(model, 1, 4), KINDS["byte_level"]()
    decoder.tokenizer = tokenizer

    def stream(prompt):
        return "".join(decoder.stream(prompt, NEW, sampling=SAMPLED))

    def session(prompt):
        opened, tokens = decoder.open_session(2, max_seq_len=40), {0: [], 1: []}
        opened.add(prompt, NEW)
        opened.add(prompt[:, :2], NEW, sampling=SAMPLED)
        while len(opened):
            for update in opened.step():
                tokens[update.request_id] += update.tokens
        return tokens

    def call(item):
        return item[0](item[1])

    items = [((stream, session)[number % 2], prompt) for number, prompt in enumerate(prompts()[:12])]
    expected = [call(item) for item in items]
    for thread in in_threads(call, items):
        assert thread == expected


@requires_native
def test_the_generate_of_transformers_in_threads(model):
    options = {"max_new_tokens": NEW, "do_sample": False}
    own = {"custom_generate": layerskip.generate, "exit_layer": 1, "num_speculations": 3}

    def call(prompt):
        return model.generate(prompt, **options, **own).tolist()

    items = prompts()[:12]
    expected = [model.generate(prompt, **options).tolist() for prompt in items]
    for thread in in_threads(call, items):
        assert thread == expected


def test_the_tables_never_shrink(monkeypatch):
    """Whoever opens the longest cache grows them, while another thread may be growing them for a shorter one."""
    decoder, longer_ready, arange = adapt(tiny_model()).decoder, Event(), torch.arange

    def slow(positions, **options):
        if positions == 8:
            longer_ready.wait(0.3)
        return arange(positions, **options)

    monkeypatch.setattr(torch, "arange", slow)
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(decoder.new_cache, 1, 8)
        time.sleep(0.05)
        pool.submit(decoder.new_cache, 1, 200).result()
        longer_ready.set()
        short.result()
    assert [len(table) for table in decoder.rope_tables] == [200, 200]


def test_the_controller_learns_from_all(model):
    decoder = SelfSpeculativeDecoder(model, "auto", "auto")
    choice = (1, 2)

    def call(seconds):
        decoder.controller.observe_cost(choice, 1, seconds)
        return decoder.controller.choose([decoder.controller.new_acceptance()]).exit_layer in (1, 2, 3)

    assert all(map(all, in_threads(call, [1e-3] * 200)))


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_decoders_and_sessions_cannot_be_copied(model, how):
    decoder = SelfSpeculativeDecoder(model, 1)
    with pytest.raises(TypeError, match=r"SelfSpeculativeDecoder can't be pickled or copied; .* the model"):
        how(decoder)
    with pytest.raises(TypeError, match="Session can't be pickled or copied"):
        how(decoder.open_session(1, max_seq_len=16))


@requires_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_continues(model):
    """OpenMP's threads do not survive a fork, and a child that waits for them hangs."""
    decoder = SelfSpeculativeDecoder(model, 1, 4)
    torch.set_num_threads(2)
    expected = decoder.generate(prompt_of(6), NEW).sequences.tolist()
    child = os.fork()
    if child == 0:
        same = decoder.generate(prompt_of(6), NEW).sequences.tolist() == expected
        os._exit(0 if same else 1)
    assert exit_status(child, seconds=20) == 0
    assert torch.get_num_threads() == 2


def exit_status(child, seconds):
    """That of a child process; one that takes longer than this is killed."""
    for _ in range(seconds * 100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the child hangs after {seconds} s")
