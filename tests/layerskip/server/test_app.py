"""The HTTP server on a tiny model: a real uvicorn on a free port, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import helpers
import httpx
import openai
import pytest
import uvicorn
from tiny import UPPER
from tokenizers_of import START, byte_level

from layerskip import SamplingParams, SelfSpeculativeDecoder
from layerskip.cli import main
from layerskip.server.app import MAX_BODY, create_app
from layerskip.server.engine import Choice, EngineStoppedError, Generation

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}"
    "<|start|>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)
PROMPTS = [f"{word} {number}:" for number in range(16) for word in ("draft", "verify", "def add", "naïve café")]


def new_model():
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    model = helpers.tiny_model("llama2", vocab_size=len(tokenizer), tie_word_embeddings=False)
    for layer in model.model.layers[1:]:  # so that some drafts are accepted
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= UPPER["weak"]
    return tokenizer, model


def new_decoder(**options):
    tokenizer, model = new_model()
    decoder = SelfSpeculativeDecoder(model, **options)
    decoder.tokenizer = tokenizer
    return decoder


@contextmanager
def serving(decoder, **options):
    """Serve; yields the engine and the address."""
    app = create_app(decoder, "tiny", **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield app.state.engine, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def decoder():
    return new_decoder(exit_layer=2)


@pytest.fixture(scope="module")
def server(decoder):
    with serving(decoder, max_batch=8, max_waiting=64) as (engine, address):
        yield engine, address


@pytest.fixture
def client(server):
    engine, address = server
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client
    all_slots_are_free(engine)


def all_slots_are_free(engine) -> None:
    until(lambda: engine.num_requests == 0)
    scheduler = engine._session._scheduler
    assert not list(scheduler)
    assert not scheduler.waiting
    assert len(scheduler.free_slots) + len(scheduler.retained) == engine.max_batch


@contextmanager
def held(engine) -> Iterator[None]:
    """Hold the engine before its next step."""
    step, gate = engine._session.step, threading.Event()

    def held_step():
        assert gate.wait(20)
        return step()

    engine._session.step = held_step
    try:
        yield
    finally:
        gate.set()
        del engine._session.step


def expected(decoder, prompt, length, sampling=None):
    """The text that the library gives for a prompt, a text or token ids."""
    tokenizer = decoder.tokenizer
    ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
    out = decoder.generate([ids], max_new_tokens=length, sampling=sampling)
    before, whole = (tokenizer.decode(one, skip_special_tokens=True) for one in (ids, out.sequences[0].tolist()))
    assert whole.startswith(before)
    return whole[len(before) :]


class TestTexts:
    def test_greedy_completions_are_those_of_generate(self, decoder, client):
        for prompt in PROMPTS[:4]:
            done = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0)
            (choice,) = done.choices
            assert choice.text == expected(decoder, prompt, 24)
            assert choice.finish_reason == "length"
            count = len(decoder.tokenizer(prompt).input_ids)
            assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (count, 24)
            assert done.usage.total_tokens == count + 24

    def test_several_prompts_and_choices_come_in_order(self, decoder, client):
        ids = decoder.tokenizer(PROMPTS[1]).input_ids
        done = client.completions.create(
            model="tiny", prompt=[PROMPTS[0], PROMPTS[2]], n=2, max_tokens=8, temperature=0
        )
        texts = [expected(decoder, PROMPTS[number], 8) for number in (0, 0, 2, 2)]
        assert [choice.text for choice in done.choices] == texts
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        lengths = [len(decoder.tokenizer(PROMPTS[number]).input_ids) for number in (0, 2)]
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (sum(lengths), 32)
        tokens = client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
        assert tokens.choices[0].text == expected(decoder, ids, 8)

    def test_sampled_texts_are_those_of_their_seed(self, decoder, client):
        sampling = SamplingParams(0.8, top_k=40, top_p=0.9, repetition_penalty=1.1, logit_bias={7: -100.0})
        done = client.completions.create(
            model="tiny", prompt=PROMPTS[3], n=2, max_tokens=12, temperature=0.8, top_p=0.9, seed=5,
            logit_bias={"7": -100}, extra_body={"top_k": 40, "repetition_penalty": 1.1},
        )  # fmt: skip
        texts = [expected(decoder, PROMPTS[3], 12, replace(sampling, seed=seed)) for seed in (5, 6)]
        assert [choice.text for choice in done.choices] == texts
        assert texts[0] != texts[1]

    def test_the_temperature_is_one_by_default(self, decoder, client):
        done = client.completions.create(model="tiny", prompt=PROMPTS[0], seed=3)
        assert done.choices[0].text == expected(decoder, PROMPTS[0], 16, SamplingParams(1.0, seed=3))

    def test_chat_fills_the_template(self, decoder, client):
        messages = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}]},
        ]
        done = client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=12, temperature=0, user="me"
        )
        text = f"{START}system: Be brief.\n{START}user: Say hi\n{START}assistant: "
        ids = decoder.tokenizer(text, add_special_tokens=False).input_ids
        assert done.choices[0].message.content == expected(decoder, ids, 12)
        assert done.choices[0].message.role == "assistant"
        assert done.usage.prompt_tokens == len(ids)

    def test_a_chat_answer_may_fill_the_context(self, decoder, client):
        messages = [{"role": "user", "content": "Go on"}]
        done = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
        assert done.usage.total_tokens == decoder.max_seq_len
        assert done.choices[0].finish_reason == "length"

    def test_streams_give_the_same_text_in_pieces(self, decoder, client):
        stream = client.completions.create(
            model="tiny", prompt=PROMPTS[:2], max_tokens=24, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        assert chunks.pop().usage.completion_tokens == 48
        for index in range(2):
            choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
            assert "".join(choice.text for choice in choices) == expected(decoder, PROMPTS[index], 24)
            assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
            assert choices[-1].finish_reason == "length"
            assert len(choices) > 4

    def test_a_chat_stream_begins_with_the_role(self, decoder, client):
        messages = [{"role": "user", "content": "Go on"}]
        options = {"model": "tiny", "messages": messages, "max_tokens": 16, "temperature": 0}
        whole = client.chat.completions.create(**options).choices[0].message.content
        chunks = list(client.chat.completions.create(**options, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
        assert chunks[-1].choices[0].finish_reason == "length"

    @pytest.mark.parametrize("stream", [False, True])
    def test_the_text_ends_before_a_stop_string(self, decoder, client, stream):
        text = expected(decoder, PROMPTS[0], 24)
        stop = text[9:12]
        done = client.completions.create(
            model="tiny", prompt=PROMPTS[0], max_tokens=24, temperature=0, stop=["never found", stop], stream=stream
        )
        choices = [chunk.choices[0] for chunk in done] if stream else done.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"

    def test_the_text_ends_before_eos(self, decoder):
        ids = decoder.tokenizer(PROMPTS[0]).input_ids
        tokens = decoder.generate([ids], max_new_tokens=24).new_tokens[0].tolist()
        end = next(place for place in range(4, 24) if tokens[place] not in tokens[:place])
        other = new_decoder(exit_layer=2)
        other.defaults = replace(other.defaults, eos_token_id=tokens[end])
        with serving(other) as (_, address):
            fields = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}
            done = httpx.post(f"{address}/v1/completions", json=fields).json()
        assert done["choices"][0]["finish_reason"] == "stop"
        assert done["usage"]["completion_tokens"] == end + 1

    def test_a_prefix_is_read_once(self, decoder):
        with serving(new_decoder(exit_layer=2)) as (engine, address):
            fields = {"model": "tiny", "prompt": "The early layers draft: " * 4, "max_tokens": 4, "temperature": 0}
            first, second = (httpx.post(f"{address}/v1/completions", json=fields).json() for _ in range(2))
            assert first["choices"] == second["choices"]
            usage = second["usage"]
            assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
            assert engine.counters["reused_tokens"] == usage["prompt_tokens"] - 1
            all_slots_are_free(engine)


BAD = [
    ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is not supported"),
    ({"presence_penalty": 1}, "presence_penalty", "not supported"),
    ({"logprobs": 0}, "logprobs", "not supported"),
    ({"logprobs": 5}, "logprobs", "not supported"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"echo": True}, "echo", "not supported"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"messages": []}, "messages", "not supported"),
    ({"max_completion_tokens": 3}, "max_completion_tokens", "not supported"),
    ({"no_such_field": 1}, "no_such_field", "not supported"),
    ({"temperature": -1}, "temperature", "temperature must be in"),
    ({"temperature": "hot"}, "temperature", "must be a number"),
    ({"top_p": 0}, "top_p", "top_p must be in"),
    ({"seed": -1}, "seed", "seed must be"),
    ({"logit_bias": [1]}, "logit_bias", "must be an object"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    ({"logit_bias": {"99999": 1}}, None, "outside the vocabulary"),
    ({"n": 0}, "n", "n must be in 1"),
    ({"n": True}, "n", "must be an int"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 1 << 20}, None, "max_seq_len"),
    ({"stop": ""}, "stop", "none of them empty"),
    ({"stop": 5}, "stop", "stop must be"),
    ({"stream": 1}, "stream", "must be true or false"),
    ({"stream_options": {"every": 1}}, "stream_options", "include_usage"),
    ({"prompt": ""}, None, "the prompt is empty"),
    ({"prompt": []}, "prompt", "prompt must be"),
    ({"prompt": [1, "x"]}, "prompt", "prompt must be"),
    ({"prompt": [[1, True]]}, "prompt", "prompt must be"),
    ({"prompt": [99999]}, None, "outside the vocabulary"),
    ({"prompt": None}, "prompt", "prompt must be"),
    ({"model": None}, "model", "model is missing"),
]
BAD_CHATS = [
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"logprobs": True}, "logprobs", "not supported"),
    ({"top_logprobs": 2}, "top_logprobs", "not supported"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
    ({"prompt": "x"}, "prompt", "not supported"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "exclude each other"),
    ({"messages": None}, "messages", "at least one message"),
    ({"messages": ["x"]}, "messages[0]", "must be an object"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "got 'tool'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "must be one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "must be a text"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supp"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]},
        "messages",
        "the system message comes first",
    ),
]
NEUTRAL = [
    {"frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1, "echo": False, "suffix": None, "logprobs": None},
    {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
]


class TestFields:
    @pytest.mark.parametrize(("fields", "param", "message"), BAD)
    def test_a_bad_field_is_refused_by_name(self, client, fields, param, message):
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            client.post(
                "/completions", cast_to=object, body={"model": "tiny", "prompt": "x", "max_tokens": 2, **fields}
            )
        assert refused.value.param == param
        assert refused.value.type == "invalid_request_error"

    @pytest.mark.parametrize(("fields", "param", "message"), BAD_CHATS)
    def test_a_bad_field_of_a_chat_is_refused_by_name(self, client, fields, param, message):
        messages = [{"role": "user", "content": "x"}]
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            client.post("/chat/completions", cast_to=object, body={"model": "tiny", "messages": messages, **fields})
        assert refused.value.param == param

    @pytest.mark.parametrize("fields", NEUTRAL)
    def test_a_field_that_changes_nothing_is_taken(self, decoder, client, fields):
        done = client.post(
            "/completions", cast_to=object,
            body={"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0, **fields},
        )  # fmt: skip
        assert done["choices"][0]["text"] == expected(decoder, PROMPTS[0], 4)

    def test_a_context_that_is_too_long_has_a_code(self, client):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt=[5] * 300)
        assert refused.value.code == "context_length_exceeded"

    def test_without_a_chat_template(self, decoder, client, monkeypatch):
        monkeypatch.setattr(decoder.tokenizer, "chat_template", None)
        with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])

    @pytest.mark.parametrize(
        ("body", "status", "message"),
        [
            (b"{", 400, "the body is not JSON"),
            (b"\xff", 400, "the body is not JSON"),
            (b"[" * 100_000, 400, "the body is not JSON"),
            (b"[1]", 400, "must be a JSON object"),
            (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "surrogates not allowed"),
            (b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', 400, "is not supported"),
            (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "temperature must be in"),
            (b" " * (MAX_BODY + 1), 413, "bytes"),
        ],
        ids=["cut", "bytes", "deep", "list", "surrogate", "name", "nan", "long"],
    )
    def test_a_body_that_is_none(self, server, body, status, message):
        answer = httpx.post(f"{server[1]}/v1/completions", content=body)
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]

    def test_models_and_other_routes(self, client, server):
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").max_model_len == server[0].max_seq_len
        with pytest.raises(openai.NotFoundError, match="model 'other' is not served, only 'tiny'"):
            client.models.retrieve("other")
        with pytest.raises(openai.NotFoundError, match="is not served"):
            client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="tiny", input="x")
        assert httpx.get(f"{server[1]}/v1/completions").status_code == 405
        assert httpx.get(f"{server[1]}/health").text == "ok\n"

    def test_a_key_guards_what_costs(self, decoder):
        with serving(decoder, max_batch=1, api_key="schlüssel") as (_, address):
            paths = ("models", "models/tiny", "completions", "chat/completions")
            for key in (None, "Bearer wrong", "Basic schlüssel", "Bearer"):
                headers = {} if key is None else {"authorization": key.encode()}
                for path in paths:
                    method = "POST" if "completions" in path else "GET"
                    answer = httpx.request(method, f"{address}/v1/{path}", headers=headers, content=b"{")
                    assert answer.status_code == 401, (key, path)
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            headers = {"authorization": "Bearer schlüssel".encode()}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
            assert httpx.get(f"{address}/health").status_code == 200


class TestLoad:
    @pytest.mark.time_limit(120)
    def test_64_streams_of_which_many_break_off(self, decoder, server):
        """Each text is its prompt's own, whole or up to where the client left."""
        engine, address = server
        cancelled = engine.counters["cancelled"]
        rng = random.Random(0)
        ids = [decoder.tokenizer(prompt).input_ids for prompt in PROMPTS]
        texts = [expected(decoder, prompt, 40) for prompt in PROMPTS]
        leave_after = [rng.choice([None, 0, 1, 3, 6]) for _ in PROMPTS]

        async def one(client: openai.AsyncOpenAI, index: int) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=ids[index], max_tokens=40, temperature=0, stream=True
            )
            text = ""
            async with stream:
                for count in range(10**6):
                    if count == leave_after[index]:
                        return text
                    try:
                        text += (await anext(stream)).choices[0].text
                    except StopAsyncIteration:
                        return text
            raise AssertionError

        async def every() -> list[str]:
            limits = httpx.Limits(max_connections=64)
            async with httpx.AsyncClient(limits=limits, timeout=60) as http:
                client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, http_client=http)
                return await asyncio.gather(*(one(client, index) for index in range(64)))

        got = asyncio.run(every())
        for text, whole, left in zip(got, texts, leave_after, strict=True):
            assert whole.startswith(text) if left is not None else text == whole
        all_slots_are_free(engine)
        assert engine.counters["cancelled"] > cancelled

    def test_a_full_queue_is_429_and_adds_nothing(self, decoder):
        with (
            serving(decoder, max_batch=1, max_waiting=1) as (engine, address),
            openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
        ):
            options = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}
            with pytest.raises(openai.RateLimitError, match="max_waiting=1") as refused:
                client.completions.create(**options, n=3)
            assert refused.value.code == "queue_full"
            all_slots_are_free(engine)
            assert engine.counters["length"] == 0
            texts = {choice.text for choice in client.completions.create(**options, n=2).choices}
            assert texts == {expected(decoder, PROMPTS[0], 4)}

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_ends_its_requests_running_or_waiting(self, decoder, stream):
        with serving(decoder, max_batch=1) as (engine, address):
            fields = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 200, "n": 2, "stream": stream}
            with held(engine):
                with (
                    pytest.raises(httpx.ReadTimeout),
                    httpx.stream("POST", f"{address}/v1/completions", json=fields, timeout=0.3) as answer,
                ):
                    answer.read()
                metrics = httpx.get(f"{address}/metrics").text.splitlines()
                assert "layerskip_requests_running 1" in metrics
                assert "layerskip_requests_waiting 1" in metrics
                until(lambda: not engine._calls.empty())
            all_slots_are_free(engine)
            assert engine.counters["cancelled"] == 2

    def test_metrics_count(self, decoder):
        with serving(decoder) as (_, address):
            ids = decoder.tokenizer(PROMPTS[0]).input_ids
            fields = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 20, "temperature": 0}
            httpx.post(f"{address}/v1/completions", json=fields)
            lines = httpx.get(f"{address}/metrics").text.splitlines()
        stats = decoder.generate([ids], max_new_tokens=20).stats
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert stats.drafted > 0
        assert {name.removeprefix("layerskip_"): float(value) for name, value in values.items()} == {
            "requests_running": 0, "requests_waiting": 0, "prompt_tokens_total": len(ids),
            "prompt_tokens_reused_total": 0, "generated_tokens_total": 20, "draft_tokens_total": stats.drafted,
            "accepted_tokens_total": stats.accepted, "acceptance_rate": stats.acceptance_rate,
            'requests_total{reason="eos"}': 0, 'requests_total{reason="stop"}': 0,
            'requests_total{reason="length"}': 1, 'requests_total{reason="cancelled"}': 0,
            'requests_total{reason="error"}': 0,
        }  # fmt: skip
        names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert sorted(names) == sorted({name.partition("{")[0] for name in values})


class TestFaults:
    def test_only_its_thread_may_use_the_session(self, server):
        with pytest.raises(RuntimeError, match="belongs to the engine's thread"):
            _ = server[0].session

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_step_that_fails_is_reported_and_the_next_request_is_served(self, decoder, server, client, stream):
        engine, _ = server
        options = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}
        session, step = engine._session, engine._session.step

        def fails():
            session.step = step
            raise MemoryError("no room")

        session.step = fails
        try:
            with pytest.raises(openai.APIError, match="MemoryError: no room"):
                list(client.completions.create(**options, stream=stream))
        finally:
            del session.step
        assert client.completions.create(**options).choices[0].text == expected(decoder, PROMPTS[0], 4)

    def test_a_request_that_fails_fails_alone(self, decoder, server, client, monkeypatch):
        bad = decoder.tokenizer(PROMPTS[1]).input_ids
        push = sys.modules["layerskip.decoding.detokenizer"].Detokenizer.push

        def fails(self, token):
            if self._window[:2] == bad[-8:][:2]:
                raise FloatingPointError("of this one")
            return push(self, token)

        monkeypatch.setattr("layerskip.decoding.detokenizer.Detokenizer.push", fails)
        with pytest.raises(openai.InternalServerError, match="of this one"):
            client.completions.create(model="tiny", prompt=bad, max_tokens=4, temperature=0)
        monkeypatch.undo()
        done = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=4, temperature=0)
        assert done.choices[0].text == expected(decoder, PROMPTS[0], 4)

    def test_a_server_whose_thread_has_failed_says_so(self, decoder):
        with serving(decoder, max_batch=1) as (engine, address):
            fields = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 4}
            engine._take = None
            assert httpx.post(f"{address}/v1/completions", json=fields).status_code == 503
            assert httpx.post(f"{address}/v1/completions", json=fields).status_code == 503
            assert httpx.get(f"{address}/health").status_code == 503

    def test_a_decoder_without_a_tokenizer_is_refused(self):
        with pytest.raises(ValueError, match="needs a tokenizer"):
            create_app(SelfSpeculativeDecoder(helpers.tiny_model("llama2")), "tiny")

    def test_a_stopped_engine_takes_nothing(self, decoder):
        async def run() -> None:
            engine = create_app(decoder, "tiny").state.engine
            choice = Choice([5, 6], 4, SamplingParams())
            with pytest.raises(EngineStoppedError):
                await engine.submit([choice])
            engine.start()
            generation = await engine.submit([choice._replace(max_new_tokens=250)])
            await engine.stop()
            with pytest.raises(EngineStoppedError):
                [part async for part in generation]
            with pytest.raises(EngineStoppedError):
                await engine.submit([choice])
            engine.cancel(generation)

        asyncio.run(run())

    def test_who_waits_when_the_time_to_finish_is_over_is_told(self):
        async def run() -> None:
            generation = Generation([Choice([5, 6], 4, SamplingParams())], [])
            waits = asyncio.ensure_future(anext(aiter(generation)))
            await asyncio.sleep(0)
            waits.cancel()
            with pytest.raises(EngineStoppedError, match="stopping"):
                await waits

        asyncio.run(run())


class TestCommand:
    def test_a_signal_lets_what_runs_finish(self, decoder, tmp_path):
        tokenizer, model = new_model()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        command = [sys.executable, "-m", "layerskip.cli", "serve", str(tmp_path), "--port", "0", "--dtype", "float32"]
        command += ["--max-seq-len", "250", "--threads", "1"]
        environment = os.environ | {"LAYERSKIP_API_KEY": "k", "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as run:
            try:
                address = re.fullmatch(rf"serving {tmp_path} at (http://127.0.0.1:\d+/v1)\n", run.stdout.readline())[1]
                with openai.OpenAI(base_url=address, api_key="k") as client:  # it tries again until there is a server
                    (model,) = client.models.list()
                    assert model.max_model_len == 250
                    options = {"model": model.id, "prompt": PROMPTS[0], "max_tokens": 240, "temperature": 0}
                    stream = client.completions.create(**options, stream=True)
                    text = next(stream).choices[0].text
                    run.send_signal(signal.SIGTERM)
                    text += "".join(chunk.choices[0].text for chunk in stream)
                assert text == expected(decoder, PROMPTS[0], 240)
                out, err = run.communicate(timeout=30)
                assert (run.returncode, out, err) == (0, "stopped\n", "")
            finally:
                run.kill()

    def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr("layerskip.cli.options.load", lambda *_: pytest.fail("loaded"))
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            assert main(["serve", str(tmp_path), "--port", str(port)]) == 1
        assert capsys.readouterr().err.startswith(f"layerskip serve: can't listen on 127.0.0.1, port {port}: ")
        assert main(["serve", str(tmp_path), "--port", "65536"]) == 2
        assert capsys.readouterr().err == "layerskip serve: --port must be in 0 … 65535, got 65536\n"

    def test_an_open_address_without_a_key_is_warned_about(self, monkeypatch, capsys, tmp_path):
        monkeypatch.delenv("LAYERSKIP_API_KEY", raising=False)
        monkeypatch.setattr("layerskip.cli.options.load", stop_here)
        for words, warned in (
            (["--host", "0.0.0.0"], True),
            (["--host", "0.0.0.0", "--api-key", "k"], False),
            ([], False),
        ):
            assert main(["serve", str(tmp_path), "--port", "0", *words]) == 2
            assert ("can use this server: give --api-key" in capsys.readouterr().err) == warned


def stop_here(*_):
    raise ValueError("the model would be loaded here")
