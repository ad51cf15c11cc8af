"""The thread that owns a session, and what the event loop sees of it: generations, counters."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from ..decoding import SamplingParams, SelfSpeculativeDecoder, Session, Stats, Update
from ..decoding.detokenizer import SequenceText

log = logging.getLogger(__name__)


class EngineStoppedError(RuntimeError):
    """The engine takes no requests: it is not started, it is stopped, or its thread has failed."""


class Choice(NamedTuple):
    """What one choice of an answer continues, and how."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams


class Part(NamedTuple):
    """New text of the choice of that number. Its last part has a ``reason`` and ``stats``, or an ``error``."""

    choice: int
    text: str
    reason: str | None = None
    stats: Stats | None = None
    error: Exception | None = None


class Generation:
    """The choices of one HTTP request. Iterate it, in the event loop, for their parts as they come.

    Raises, while iterated, the error of a choice that fails.
    """

    def __init__(self, choices: Sequence[Choice], stop_strings: Sequence[str]) -> None:
        self.choices, self.stop_strings = choices, stop_strings
        self.parts: asyncio.Queue[Part] = asyncio.Queue()
        self.ids: list[int] = []  # of the session's requests that have not ended; the engine's own

    async def __aiter__(self) -> AsyncIterator[Part]:
        left = len(self.choices)
        while left:
            try:
                part = await self.parts.get()
            except asyncio.CancelledError:  # uvicorn's, when the time to finish is over: the client is told
                raise EngineStoppedError("the server is stopping") from None
            if part.error is not None:
                raise part.error
            left -= part.reason is not None
            yield part


class _Running:
    """A request of the session: the text that its tokens add, up to a stop string."""

    def __init__(self, generation: Generation, index: int, tokenizer: Any) -> None:
        self.generation, self._index = generation, index
        self._text = SequenceText(tokenizer, generation.stop_strings)
        self._text.start_after(generation.choices[index].prompt)
        self._pieces: list[str] = []

    def should_stop(self, new_tokens: list[int]) -> bool:
        """`Session.add`'s rule, which is asked about every token except EOS."""
        self._pieces.append(self._text.push(new_tokens[-1]))
        return self._text.stopped

    def part(self, update: Update) -> Part:
        if update.reason == "eos":
            self._pieces.append(self._text.push(update.tokens[-1]))
        if update.finished:
            self._pieces.append(self._text.finish())
        text = "".join(self._pieces)
        self._pieces.clear()
        stats = None if update.output is None else update.output.stats
        return Part(self._index, text, update.reason, stats, update.error)

    def failed(self, error: Exception) -> Part:
        return Part(self._index, "", error=error)


class Engine:
    """A session and the one thread that calls it.

    The event loop's side sends calls through a queue, and gets parts through the queues of generations.

    Parameters
    ----------
    decoder : SelfSpeculativeDecoder
        With a tokenizer.
    max_batch, max_seq_len, max_waiting : int
        As of `SelfSpeculativeDecoder.open_session`.

    Attributes
    ----------
    counters : Counter
        Totals since the start: ``prompt_tokens``, ``reused_tokens``, ``new_tokens``, ``drafted``, ``accepted``, and
        ended requests by reason.
    num_requests : int
        Requests of the session that have not ended.

    Raises
    ------
    ValueError, TypeError, MemoryError
        As `SelfSpeculativeDecoder.open_session`; ValueError for a decoder without a tokenizer.
    """

    def __init__(self, decoder: SelfSpeculativeDecoder, max_batch: int, max_seq_len: int, max_waiting: int) -> None:
        if decoder.tokenizer is None:
            raise ValueError("a server needs a tokenizer; set decoder.tokenizer, which from_pretrained does")
        self.tokenizer = decoder.tokenizer
        self.max_batch, self.max_seq_len = max_batch, max_seq_len
        self.counters: Counter[str] = Counter()
        self.num_requests = 0
        self._session = decoder.open_session(max_batch, max_seq_len=max_seq_len, max_waiting=max_waiting)
        self._running: dict[int, _Running] = {}
        self._calls: SimpleQueue[tuple[Any, Future[None]] | None] = SimpleQueue()  # None: stop
        self._lock = threading.Lock()  # of `_open` and what is put into `_calls`
        self._open = False
        self._thread: threading.Thread | None = None

    # The event loop's side

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._open

    def start(self) -> None:
        """Start the thread. Called in the event loop that the generations belong to."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="layerskip-session", daemon=True)
        self._open = True
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; what still runs fails with `EngineStoppedError`."""
        self._calls.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def submit(self, choices: Sequence[Choice], stop_strings: Sequence[str] = ()) -> Generation:
        """Add requests to the session, all or none.

        Raises
        ------
        ValueError, TypeError, SessionFullError
            As `Session.add`.
        EngineStoppedError
        """
        generation = Generation(choices, stop_strings)
        added = self._send(partial(self._add, generation))
        try:
            await asyncio.wrap_future(added)
        except asyncio.CancelledError:
            self.cancel(generation)
            raise
        return generation

    def cancel(self, generation: Generation) -> None:
        """End what still runs of a generation; nothing happens to one that has ended."""
        try:
            self._send(partial(self._cancel, generation))
        except EngineStoppedError:
            return  # the session's requests ended with the thread

    def _send(self, call: Any) -> Future[None]:
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # from here on a waiter that goes away changes nothing
        with self._lock:
            if not self._open:
                raise EngineStoppedError("the server is stopping")
            self._calls.put((call, future))
        return future

    # The thread's side

    @property
    def session(self) -> Session:
        """The session; RuntimeError in every thread but the engine's."""
        if threading.current_thread() is not self._thread:
            name = threading.current_thread().name
            raise RuntimeError(f"the session belongs to the engine's thread, it can't be used in the thread {name!r}")
        return self._session

    def _run(self) -> None:
        try:
            while self._answer_calls():
                self._step()
        except Exception:
            log.exception("the session's thread has failed")
        finally:
            with self._lock:
                self._open = False
            stopped = EngineStoppedError("the server has stopped")
            self._deliver([(one, Part(0, "", error=stopped)) for one in self._generations()])
            while True:
                try:
                    call = self._calls.get_nowait()
                except Empty:
                    break
                if call is not None:
                    call[1].set_exception(stopped)

    def _answer_calls(self) -> bool:
        """Answer the calls that wait, or while there are no requests wait for one. False: stop."""
        while not self._running or not self._calls.empty():
            call = self._calls.get()
            if call is None:
                return False
            work, future = call
            try:
                work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)
        return True

    def _add(self, generation: Generation) -> None:
        session = self.session
        added: dict[int, _Running] = {}
        try:
            for index, (prompt, max_new_tokens, sampling) in enumerate(generation.choices):
                running = _Running(generation, index, self.tokenizer)
                # A later prompt that begins with this one's tokens finds them in the cache.
                number = session.add(
                    prompt, max_new_tokens, sampling=sampling, should_stop=running.should_stop, keep=True
                )
                added[number] = running
        except BaseException:
            for number in added:
                session.remove(number)
            raise
        self._running.update(added)
        generation.ids = list(added)
        self.num_requests = len(self._running)

    def _cancel(self, generation: Generation) -> None:
        for number in generation.ids:
            if number in self._running:
                self.session.cancel(number)

    def _step(self) -> None:
        session = self.session
        try:
            updates = session.step()
        except Exception as error:
            # The next step would meet it again: end the requests, so that their clients learn of it.
            log.exception("a step has failed")
            for number in session.unfinished:
                session.remove(number)
            self.counters["error"] += len(self._running)
            failed = self._generations()
            self._running.clear()
            parts = [(one, Part(0, "", error=error)) for one in failed]
        else:
            parts = [self._take(update) for update in updates]
        self.num_requests = len(self._running)
        self._deliver(parts)

    def _take(self, update: Update) -> tuple[Generation, Part]:
        running = self._running[update.request_id]
        self.counters["new_tokens"] += len(update.tokens)
        if update.reason is not None:
            del self._running[update.request_id]
            self.counters[update.reason] += 1
            if update.error is not None:
                log.error("a request has failed", exc_info=update.error)
            if update.output is not None:
                stats = update.output.stats
                self.counters.update(
                    prompt_tokens=stats.prompt_tokens, reused_tokens=stats.reused, drafted=stats.drafted,
                    accepted=stats.accepted,
                )  # fmt: skip
        try:
            part = running.part(update)
        except Exception as error:  # of its tokenizer: the others continue
            part = running.failed(error)
        return running.generation, part

    def _generations(self) -> list[Generation]:
        return list(dict.fromkeys(one.generation for one in self._running.values()))

    def _deliver(self, parts: Sequence[tuple[Generation, Part]]) -> None:
        """Hand parts to the event loop, which `stop` keeps running until the thread has ended."""

        def put() -> None:
            for generation, part in parts:
                generation.parts.put_nowait(part)

        if parts:
            self._loop.call_soon_threadsafe(put)
