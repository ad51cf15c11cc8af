"""Routes in the form of OpenAI's API: fields are checked, answers written as JSON or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..decoding import SamplingParams, SelfSpeculativeDecoder, SessionFullError, Stats
from ..decoding.validation import integer_in
from .engine import Choice, Engine, EngineStoppedError, Generation, Part

MAX_BODY = 16 << 20  # bytes
MAX_CHOICES = 128
COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion by default, as OpenAI has it; a chat answer may fill the context."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logit_bias")
_COMMON = {"model", "n", "stream", "stream_options", "stop", "max_tokens", *_SAMPLING}
FIELDS = {"completions": {"prompt", *_COMMON}, "chat": {"messages", "max_completion_tokens", *_COMMON}}
"""Fields that are read, by route."""
WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "prediction",
}  # fmt: skip
"""Fields that change no text, so that they can be ignored."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "logprobs": (False,), "response_format": ({"type": "text"},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
}  # fmt: skip
"""The values of fields that are not supported with which they change nothing."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


class Refused(Exception):
    """A request that gets an error: its HTTP status, message, field and code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> str:
        """OpenAI's form, in ASCII: the name of a field may be no text."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return json.dumps({"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}})


class Asked(NamedTuple):
    """A request whose fields were checked."""

    chat: bool
    choices: list[Choice]
    n: int
    stop: list[str]
    stream: bool
    include_usage: bool


def create_app(
    decoder: SelfSpeculativeDecoder,
    name: str,
    *,
    max_batch: int = 8,
    max_seq_len: int | None = None,
    max_waiting: int = 64,
    api_key: str | None = None,
) -> Starlette:
    """Make the ASGI application.

    Parameters
    ----------
    decoder : SelfSpeculativeDecoder
        With a tokenizer.
    name : str
        The model's name in requests and answers.
    max_batch, max_seq_len, max_waiting : int
        As of `SelfSpeculativeDecoder.open_session`; a request that finds the queue full gets the status 429.
    api_key : str, optional
        What ``/v1`` asks for as a bearer token.

    Returns
    -------
    Starlette
        ``app.state.engine`` is its `Engine`, which runs from the application's start-up to its shutdown.

    Raises
    ------
    ValueError, TypeError, MemoryError
        As `Engine`.
    """
    engine = Engine(decoder, max_batch, decoder.max_seq_len if max_seq_len is None else max_seq_len, max_waiting)
    server = _Server(engine, name, api_key)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.stop()

    handlers = dict.fromkeys((Refused, HTTPException, Exception), _error_answer)
    routes = [
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{model:path}", server.model),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.state.engine = engine
    return app


class _Server:
    def __init__(self, engine: Engine, name: str, api_key: str | None) -> None:
        self._engine, self._name, self._api_key, self._started = engine, name, api_key, int(time.time())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n") if self._engine.alive else PlainTextResponse("stopped\n", 503)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse("\n".join(_metrics(self._engine)) + "\n", media_type="text/plain; version=0.0.4")

    def _card(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._started, "owned_by": "layerskip",
                "max_model_len": self._engine.max_seq_len}  # fmt: skip

    def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent = key.strip().encode("latin-1")  # the bytes of the header
        if scheme.lower() != "bearer" or not secrets.compare_digest(sent, self._api_key.encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    def _check_model(self, name: Any) -> None:
        if name != self._name:
            raise Refused(404, f"model {name!r} is not served, only {self._name!r}", "model", "model_not_found")

    async def _answer(self, request: Request, chat: bool) -> Response:
        self._check_key(request)
        body = await _body(request)
        asked = self._read(body, chat)
        try:
            generation = await self._engine.submit(asked.choices, asked.stop)
        except SessionFullError as error:
            raise Refused(429, str(error), code="queue_full") from error
        except (ValueError, TypeError) as error:
            code = "context_length_exceeded" if "max_seq_len" in str(error) else None
            raise Refused(400, str(error), code=code) from error
        except EngineStoppedError as error:
            raise _failed(error) from error
        answer = _Answer(asked, self._name)
        if asked.stream:
            return _EventStream(self._engine, generation, answer)
        async with _cancelled_without_client(self._engine, generation, request.receive):
            try:
                async for part in generation:
                    answer.take(part)
            except Exception as error:
                raise _failed(error) from error
        return JSONResponse(answer.whole())

    def _read(self, body: Mapping[str, Any], chat: bool) -> Asked:
        """Check all fields; raises `Refused` with the name of the field."""
        fields = {key: value for key, value in body.items() if value is not None}
        _check_fields(fields, "chat" if chat else "completions")
        if "model" not in fields:
            raise Refused(400, "model is missing", "model")
        self._check_model(fields["model"])
        prompts = [self._conversation(fields)] if chat else list(self._prompts(fields))
        with _named("n"):
            n = integer_in("n", fields.get("n", 1), 1, MAX_CHOICES)
        sampling = _sampling(fields)
        stream = _boolean(fields, "stream")
        options = fields.get("stream_options", {})
        if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
            raise Refused(400, f"stream_options takes include_usage, got {options!r}", "stream_options")
        choices = []
        for number, prompt in enumerate(prompts):
            length = _length(fields, None if chat else COMPLETION_TOKENS, self._engine.max_seq_len - len(prompt))
            for choice in range(n):
                choices.append(Choice(prompt, length, _with_seed(sampling, number * n + choice)))
        return Asked(chat, choices, n, _stop(fields), stream, stream and _boolean(options, "include_usage"))

    def _prompts(self, fields: Mapping[str, Any]) -> Iterator[list[int]]:
        """The token ids of ``prompt``: a text, texts, token ids, or lists of these."""
        given = fields.get("prompt")
        if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
            given = [given]
        if not isinstance(given, list) or not given or len(given) > MAX_CHOICES:
            raise Refused(400, "prompt must be a text, token ids, or a list of these", "prompt")
        for one in given:
            if isinstance(one, str):
                yield self._encode(one, "prompt", special=True)
            elif isinstance(one, list) and all(type(token) is int for token in one):
                yield one
            else:
                raise Refused(400, "prompt must be a text, token ids, or a list of these", "prompt")

    def _conversation(self, fields: Mapping[str, Any]) -> list[int]:
        """The token ids of ``messages`` in the tokenizer's chat template."""
        tokenizer, given = self._engine.tokenizer, fields.get("messages")
        if not isinstance(given, list) or not given:
            raise Refused(400, "messages must be a list of at least one message", "messages")
        if tokenizer.chat_template is None:
            raise Refused(400, "this model's tokenizer has no chat template; use /v1/completions", "messages")
        from jinja2 import TemplateError

        messages = [_message(one, f"messages[{index}]") for index, one in enumerate(given)]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            raise Refused(400, f"the model's chat template refuses the messages: {error}", "messages") from error
        return self._encode(text, "messages", special=False)

    def _encode(self, text: str, field: str, special: bool) -> list[int]:
        with _named(field):  # a lone surrogate is no text
            text.encode()
            ids: list[int] = self._engine.tokenizer(text, add_special_tokens=special).input_ids
            return ids


class _Answer:
    """An answer in OpenAI's form: as a whole, or chunk by chunk."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        kind = "chat.completion" if asked.chat else "text_completion"
        chunk = f"{kind}.chunk" if asked.chat and asked.stream else kind
        name = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "object": chunk, "created": int(time.time()), "model": model}
        self._texts = [""] * len(asked.choices)
        self._reasons: list[str | None] = [None] * len(asked.choices)
        self._stats: dict[int, Stats] = {}
        self._begun: set[int] = set()  # choices of which a chunk was made

    def take(self, part: Part) -> None:
        self._texts[part.choice] += part.text
        if part.reason is not None:
            self._reasons[part.choice] = FINISH_REASONS[part.reason]
            assert part.stats is not None
            self._stats[part.choice] = part.stats

    def whole(self) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for index, (text, reason) in enumerate(zip(self._texts, self._reasons, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self._asked.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": self._usage()}

    def chunk(self, part: Part) -> dict[str, Any]:
        said: dict[str, Any] = {"text": part.text}
        if self._asked.chat:
            role = {} if part.choice in self._begun else {"role": "assistant"}
            said = {"delta": {**role, "content": part.text}}
            self._begun.add(part.choice)
        choice = {"index": part.choice, **said, "logprobs": None, "finish_reason": self._reasons[part.choice]}
        return {**self._head, "choices": [choice], **({"usage": None} if self._asked.include_usage else {})}

    def last_chunks(self) -> list[dict[str, Any]]:
        return [{**self._head, "choices": [], "usage": self._usage()}] if self._asked.include_usage else []

    def _usage(self) -> dict[str, Any]:
        """Counts over all choices; a prompt of several counts once."""
        first = [stats for index, stats in self._stats.items() if index % self._asked.n == 0]
        prompt, new = sum(one.prompt_tokens for one in first), sum(one.new_tokens for one in self._stats.values())
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(one.reused for one in first)},
        }  # fmt: skip


class _EventStream(Response):
    """An answer as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, engine: Engine, generation: Generation, answer: _Answer) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._engine, self._generation, self._answer = engine, generation, answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with _cancelled_without_client(self._engine, self._generation, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._lines():
                body = f"data: {line}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async for part in self._generation:
                self._answer.take(part)
                if part.text or part.reason:
                    yield _json(self._answer.chunk(part))
        except Exception as error:  # the status is sent: the client's library raises what stands in the event
            yield _failed(error).body
            return
        for chunk in self._answer.last_chunks():
            yield _json(chunk)
        yield "[DONE]"


@asynccontextmanager
async def _cancelled_without_client(engine: Engine, generation: Generation, receive: Any) -> AsyncIterator[None]:
    """Cancel a generation when its client goes away, and whenever the block is left before the generation's end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        engine.cancel(generation)  # whose parts then end

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        engine.cancel(generation)


# Fields


def _check_fields(fields: Mapping[str, Any], route: str) -> None:
    for name, value in fields.items():
        if name in FIELDS[route] or name in WITHOUT_EFFECT:
            continue
        # True == 1 in Python, and JSON's false is not its 0: logprobs=0 asks for something.
        neutral = NEUTRAL.get(name, ())
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            raise Refused(400, f"{name} is not supported", name, "unsupported_parameter")


def _sampling(fields: Mapping[str, Any]) -> SamplingParams:
    given: dict[str, Any] = {name: fields[name] for name in _SAMPLING if name in fields}
    if "logit_bias" in given:
        with _named("logit_bias"):
            if not isinstance(given["logit_bias"], dict):
                raise TypeError(f"logit_bias must be an object, got {given['logit_bias']!r}")
            given["logit_bias"] = {int(token): value for token, value in given["logit_bias"].items()}
    for name, value in given.items():  # one by one, so that the error has the name
        with _named(name):
            SamplingParams(**{name: value})
    return SamplingParams(**{"temperature": 1.0, **given})


def _with_seed(sampling: SamplingParams, index: int) -> SamplingParams:
    """Choices of one seed differ, as the sequences of a batch do."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + index) % 2**63)


def _length(fields: Mapping[str, Any], default: int | None, room: int) -> int:
    """``max_completion_tokens`` or ``max_tokens``; by default what is left of the context."""
    if "max_completion_tokens" in fields and "max_tokens" in fields:
        raise Refused(400, "max_tokens and max_completion_tokens exclude each other", "max_tokens")
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    with _named(name):
        # A prompt without any room is the session's to refuse.
        return integer_in(name, fields.get(name, max(1, room) if default is None else default), 1)


def _stop(fields: Mapping[str, Any]) -> list[str]:
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise Refused(400, f"stop must be a text or a list of texts, none of them empty, got {stop!r}", "stop")
    return stop


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name} must be true or false, got {value!r}", name)
    return bool(value)


def _message(given: Any, where: str) -> dict[str, str]:
    """A message for the chat template: its role, text and name."""
    if not isinstance(given, dict):
        raise Refused(400, f"{where} must be an object, got {given!r}", where)
    fields = {key: value for key, value in given.items() if value is not None and value != []}
    for name in fields.keys() - {"role", "content", "name"}:
        raise Refused(400, f"{where}.{name} is not supported", f"{where}.{name}", "unsupported_parameter")
    role, content = fields.get("role"), fields.get("content")
    if role not in list(ROLES):  # which compares; a role need not be hashable
        raise Refused(400, f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", f"{where}.role")
    if isinstance(content, list):
        parts = [one if isinstance(one, dict) and one.get("type") == "text" else {} for one in content]
        texts = [one["text"] for one in parts if isinstance(one.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content must be a text, or parts of the type text", f"{where}.content")
    name = {"name": str(fields["name"])} if "name" in fields else {}
    return {"role": ROLES[role], "content": content, **name}


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Refuse the field for a ValueError or TypeError within."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Refused(400, str(error), field) from error


async def _body(request: Request) -> dict[str, Any]:
    received = bytearray()
    try:
        async for piece in request.stream():
            received += piece
            if len(received) > MAX_BODY:
                raise Refused(413, f"the body has more than {MAX_BODY} bytes")
    except ClientDisconnect as error:
        raise Refused(400, "the client left before the end of the body") from error
    try:
        body = json.loads(received)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return body


# Answers


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _failed(error: Exception) -> Refused:
    if isinstance(error, EngineStoppedError):
        return Refused(503, str(error))
    return Refused(500, f"{type(error).__name__}: {error}")


async def _error_answer(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # of the router
        error = Refused(error.status_code, error.detail)
    elif not isinstance(error, Refused):
        error = _failed(error)
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status, {})
    return Response(error.body, error.status, headers, "application/json")


def _metrics(engine: Engine) -> Iterator[str]:
    """Lines of Prometheus' text format."""
    counters, running = engine.counters, min(engine.num_requests, engine.max_batch)
    drafted, accepted = counters["drafted"], counters["accepted"]
    rate = accepted / drafted if drafted else 0.0
    values: Sequence[tuple[str, str, float]] = (
        ("requests_running", "Requests with a slot of the KV cache.", running),
        ("requests_waiting", "Requests that wait for a slot.", engine.num_requests - running),
        ("prompt_tokens_total", "Prompt tokens of requests that have ended.", counters["prompt_tokens"]),
        ("prompt_tokens_reused_total", "Of these, those that were in the cache already.", counters["reused_tokens"]),
        ("generated_tokens_total", "New tokens.", counters["new_tokens"]),
        ("draft_tokens_total", "Draft tokens that were verified, of requests that have ended.", drafted),
        ("accepted_tokens_total", "Of these, those that were accepted.", accepted),
        ("acceptance_rate", "Accepted over verified draft tokens since the start; 0 without drafts.", rate),
    )
    for name, text, value in values:
        kind = "counter" if name.endswith("_total") else "gauge"
        yield f"# HELP layerskip_{name} {text}\n# TYPE layerskip_{name} {kind}\nlayerskip_{name} {value}"
    name = "layerskip_requests_total"
    yield f"# HELP {name} Requests that have ended, by reason.\n# TYPE {name} counter"
    for reason in ("eos", "stop", "length", "cancelled", "error"):
        yield f'{name}{{reason="{reason}"}} {counters[reason]}'
