"""Random requests in one session, each compared with its single run: ``python -m tools.soak``, ``make soak``.

The model is tiny and random, the session has few slots. Requests differ in length, strategy, exit layer, drafts,
threshold, sampling, processor and what ends them; some are cancelled or removed, hooks raise, interrupts leave steps.
Request n depends on the seed and n alone; beside which others it runs, on a clock, too, where "auto" chooses.

With ``--signals N``, another process sends SIGINT and SIGTERM at random moments, until N of them have raised an
exception within a call of the session.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import layerskip
from layerskip import DraftHead, DraftSource, SamplingParams, SelfSpeculativeDecoder
from layerskip.decoding.outputs import GenerationOutput, Update
from layerskip.decoding.session import Session
from layerskip.models import model as model_module

VOCABULARY, LAYERS, LONGEST, MOST_DRAFTS = 101, 4, 64, 6


class Fault(Exception):
    """Raised in a hook: it ends the request that the hook belongs to."""


class Interrupted(BaseException):
    """Raised in a step as Ctrl-C would be: it leaves the step, and nothing may be lost."""


@dataclass(frozen=True)
class Echo(DraftSource):
    """A source of one's own: drafts the last tokens once more."""

    length: int

    def propose(self, history: Sequence[int]) -> Sequence[int]:
        return history[-self.length :]


@dataclass(frozen=True)
class Case:
    """One request. ``fault`` and ``interrupt`` are after how many new tokens a hook raises, 0: never."""

    index: int
    prompt: list[int]
    options: dict[str, Any]
    processed: bool
    stop_after: int
    fault: int
    interrupt: int

    @property
    def sampled(self) -> bool:
        """Whether its tokens are drawn."""
        return not self.options["sampling"].greedy

    def rule(self, disturbed: bool) -> Callable[[list[int]], bool]:
        """What ends it; where ``disturbed``, it raises, too: an interrupt once, a fault for ever."""
        pending = disturbed and self.interrupt > 0 and not self.processed

        def rule(tokens: list[int]) -> bool:
            nonlocal pending
            if pending and len(tokens) >= self.interrupt:
                pending = False
                raise Interrupted
            if disturbed and not self.processed and 0 < self.fault <= len(tokens):
                raise Fault(f"request {self.index}")
            return len(tokens) == self.stop_after

        return rule

    def processor(self, disturbed: bool) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Logits processor that forbids a token, which depends on the history; its errors are raised here."""
        if not self.processed:
            return None
        pending = disturbed and self.interrupt > 0

        def processor(history: Tensor, logits: Tensor) -> Tensor:
            nonlocal pending
            made = len(history) - len(self.prompt)
            if pending and made >= self.interrupt:
                pending = False
                raise Interrupted
            if disturbed and 0 < self.fault <= made:
                raise Fault(f"request {self.index}")
            logits[int(history.sum()) % VOCABULARY] = -torch.inf
            return logits

        return processor


def case_of(seed: int, index: int) -> Case:
    """Request ``index`` of a run."""
    chance = random.Random(f"{seed}/{index}")
    length = chance.randint(1, 30)
    strategy = chance.choice(("self_speculative",) * 6 + ("autoregressive", "early_exit"))
    sampling = _sampling(chance)
    adaptive = sampling.greedy and strategy == "self_speculative"
    options = {
        "max_new_tokens": chance.randint(1, LONGEST - length if chance.random() < 0.2 else 24),
        "strategy": strategy,
        "exit_layer": "auto" if adaptive and chance.random() < 0.1 else chance.randint(1, LAYERS - 1),
        "num_speculations": "auto" if adaptive and chance.random() < 0.1 else chance.randint(1, MOST_DRAFTS),
        "draft_threshold": chance.choice((0.0, 0.0, 0.02, 0.1, 1.0)),
        "draft_source": _source(chance, adaptive) if strategy == "self_speculative" else "exit",
        "sampling": sampling,
        "eos_token_id": chance.sample(range(VOCABULARY), chance.choice((0, 0, 1, 3))),
    }

    if strategy == "self_speculative" and options["exit_layer"] != "auto" and draft_layers_of(seed):
        options["exit_layer"] = 1  # the exit's own

    def sometimes(probability: float) -> int:
        return chance.randint(1, 12) if chance.random() < probability else 0

    prompt = [chance.randrange(VOCABULARY) for _ in range(length)]
    return Case(index, prompt, options, chance.random() < 0.15, sometimes(0.2), sometimes(0.04), sometimes(0.04))


def _source(chance: random.Random, adaptive: bool) -> str | DraftSource:
    """Where drafts come from: a clock decides it for greedy requests only, whose tokens do not depend on it."""
    others: list[str | DraftSource] = ["ngram", Echo(chance.randint(1, 8)), *(["auto"] if adaptive else [])]
    return "exit" if chance.random() < 0.6 else chance.choice(others)


def _sampling(chance: random.Random) -> SamplingParams:
    penalty = chance.choice((1.0,) * 5 + (1.3,))
    if chance.random() < 0.6:
        return SamplingParams(repetition_penalty=penalty)
    cuts: dict[str, Any] = chance.choice(
        ({}, {}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.05})
    )
    seed = chance.randrange(2**40)
    return SamplingParams(chance.choice((0.7, 1.0, 1.5)), seed=seed, repetition_penalty=penalty, **cuts)


def draft_layers_of(seed: int) -> int:
    """How many draft layers the exit of a run's decoder has; with none it drafts after any layer."""
    return random.Random(f"{seed}/draft layers").choice((0, 0, 1, 2))


SLOTS, WAITING = 4, 8
PATIENCE = 200  # steps without an update, after which requests are lost
WARM_UP = 0.3  # of the run, until which memory may grow
MEMORY_MIB = 16  # that may be added afterwards; 0.2 seen in 10,000 requests, a short run has a short warm-up


class Mismatch(AssertionError):
    """Raised for a request whose result is wrong."""


def tiny_decoder(seed: int) -> SelfSpeculativeDecoder:
    """A random model, of which the layers after the first add little, so that some drafts are accepted.

    The dtype and what drafts depend on the seed, too.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    chance = random.Random(seed)
    head = chance.choice(("full", "int8", DraftHead(range(0, VOCABULARY, 2), VOCABULARY)))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=72, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model, source = LlamaForCausalLM(config).eval(), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=source)
        parameter.data = values * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 1 + 0.3 * values
    for layer in model.model.layers[1:]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= 0.15
    model = layerskip.adapt(model.to(chance.choice((torch.float32, torch.bfloat16))))
    draft_layers = [model.decoder.layer(1 + number) for number in range(draft_layers_of(seed))]
    own = layerskip.Exit(1, model.head.norm_weight, LAYERS, VOCABULARY, draft_layers) if draft_layers else None
    return SelfSpeculativeDecoder(model, 1, 4, draft_head=head, exit=own)


@dataclass
class Reached:
    """How far a run has come."""

    requests: int = 0
    compared: int = 0
    sampled: int = 0
    tokens: int = 0
    accepted: int = 0
    cancelled: int = 0
    removed: int = 0
    faults: int = 0
    interrupts: int = 0
    seconds: float = 0.0
    grown_mib: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests in {self.seconds / 60:.1f} min: {self.compared:,} as their single runs "
            f"({self.sampled:,} of them sampled), {self.tokens:,} tokens, {self.accepted:,} of them drafts; "
            f"{self.cancelled} cancelled, {self.removed} removed, {self.faults} faults, {self.interrupts} interrupts; "
            f"memory {self.grown_mib:+.1f} MiB after warming up"
        )


@dataclass
class _Running:
    case: Case
    cancelled: bool | None = False  # None: perhaps, as the call was interrupted
    tokens: list[int] = field(default_factory=list)


class Soak:
    """A session, its requests, and their expected results.

    Parameters
    ----------
    seed : int
    decoder : SelfSpeculativeDecoder, optional
        By default `tiny_decoder`.
    interrupts : callable, optional
        Gives the context of every call of the session, which may raise `Interrupted` there; by default `interrupting`.
    """

    def __init__(
        self,
        seed: int,
        decoder: SelfSpeculativeDecoder | None = None,
        interrupts: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        self.seed, self.reached = seed, Reached()
        self._interrupts = interrupts or (lambda: interrupting(self._chance))
        self._decoder = tiny_decoder(seed) if decoder is None else decoder
        most = DraftSource.max_drafts  # as a request alone may draft, because the number decides what is drawn
        self._session = self._decoder.open_session(SLOTS, max_seq_len=LONGEST, num_speculations=most)
        self._running: dict[int, _Running] = {}
        self._chance, self._idle = random.Random(seed), 0  # steps without an update

    def run(
        self,
        minutes: float,
        requests: int,
        show: Callable[[Reached, float], None] = lambda *_: None,
        interrupts: int = sys.maxsize,
    ) -> Reached:
        """Run until one is reached, let what runs come to its end, and check that nothing is left behind.

        ``show`` is called after every step with the progress and the share of the run.

        Raises
        ------
        Mismatch
            At the first request that is not as its single run, and for memory or a slot that was lost.
        """
        reached, started, warm = self.reached, time.perf_counter(), None
        share = 0.0
        while share < 1 or self._running:
            if share < 1:
                self._add(requests)
                self._end_some()
            self._step()
            reached.seconds = time.perf_counter() - started
            share = max(reached.seconds / (60 * minutes), reached.requests / requests, reached.interrupts / interrupts)
            if warm is None and share > WARM_UP:
                warm = resident_mib()
            show(reached, min(share, 1.0))
        reached.grown_mib = resident_mib() - (warm or resident_mib())
        if reached.grown_mib > MEMORY_MIB:
            raise Mismatch(f"memory grew by {reached.grown_mib:.0f} MiB after warming up")
        self._check_slots()
        return reached

    def _add(self, requests: int) -> None:
        """Keep a few requests waiting."""
        while len(self._running) < SLOTS + WAITING and self.reached.requests < requests:
            case = case_of(self.seed, self.reached.requests)
            hooks: dict[str, Any] = {"should_stop": case.rule(True), "logits_processor": case.processor(True)}
            if (added := self._call(self._session.add, case.prompt, **case.options, **hooks)) is None:
                continue  # interrupted, so nothing is added
            self._running[added] = _Running(case)
            self.reached.requests += 1

    def _end_some(self) -> None:
        """Cancel or remove a request now and then, whether it waits or runs."""
        if self._chance.random() > 0.02:
            return
        victim = self._chance.choice(list(self._running))
        if self._running[victim].cancelled:
            return
        removes = self._chance.random() < 0.5
        end, before = self._session.remove if removes else self._session.cancel, self.reached.interrupts
        try:
            self._call(end, victim)
            if interrupted := self.reached.interrupts > before:
                end(victim)
        except ValueError:
            if not self.reached.interrupts:
                raise
            interrupted = True
            if victim not in self._session.unfinished and not removes:
                raise
            # It ended in an earlier step or in the call, which were interrupted; its last update is on the way.
        self._running[victim].cancelled = None if interrupted else True
        if removes:
            del self._running[victim]
            self.reached.removed += 1

    def _call(self, method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call the session; None if that is interrupted."""
        try:
            with self._interrupts():
                return method(*args, **named)
        except Interrupted:
            self.reached.interrupts += 1
            return None
        finally:
            if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                raise AssertionError(f"{method.__name__} has changed autograd's modes")

    def _step(self) -> None:
        interrupts = self.reached.interrupts
        updates = self._call(self._session.step) or []
        self._idle = 0 if updates else self._idle + (self.reached.interrupts == interrupts)
        if self._idle > PATIENCE:
            raise Mismatch(f"{len(self._running)} requests have had no update for {PATIENCE} steps")
        for update in updates:
            running = self._running[update.request_id]
            running.tokens += update.tokens
            if update.finished:
                del self._running[update.request_id]
                self._compare(running, update)

    def _compare(self, running: _Running, update: Update) -> None:
        """With the same request alone, greedy ones with plain decoding."""
        case, reached, output = running.case, self.reached, update.output
        assert output is not None
        expected = self._alone(case)
        whole, got = expected.new_tokens[0].tolist(), output.new_tokens[0].tolist()
        partial = update.reason in ("cancelled", "error")
        if update.reason == "error" and not isinstance(update.error, Fault):
            raise Mismatch(f"{case} ended with {update.error!r}") from update.error
        if running.tokens != got:
            raise Mismatch(f"{case} was given {running.tokens} step by step and {got} at its end")
        if got != (whole[: len(got)] if partial else whole):
            raise Mismatch(f"{case} gave {got}, alone {whole}")
        if not partial and (update.reason,) != expected.reasons:
            raise Mismatch(f"{case} ended by {update.reason}, alone by {expected.reasons[0]}")
        if running.cancelled is None:
            running.cancelled = update.reason == "cancelled"
        if running.cancelled != (update.reason == "cancelled"):
            raise Mismatch(f"{case} ended by {update.reason}, cancelled: {running.cancelled}")
        if not running.cancelled and 0 < case.fault < len(whole) and update.reason != "error":
            raise Mismatch(f"{case} ended by {update.reason}, though a hook raised")
        if not case.fault and update.reason == "error":
            raise Mismatch(f"{case} ended with the fault of another: {update.error}")
        reached.cancelled += update.reason == "cancelled"
        reached.faults += update.reason == "error"
        reached.compared, reached.sampled = reached.compared + 1, reached.sampled + case.sampled
        reached.tokens, reached.accepted = reached.tokens + len(got), reached.accepted + output.stats.accepted

    def _alone(self, case: Case) -> GenerationOutput:
        options = dict(case.options)
        if not case.sampled and options["strategy"] == "self_speculative":
            for name in ("exit_layer", "num_speculations", "draft_threshold", "draft_source"):
                del options[name]
            options["strategy"] = "autoregressive"
        hooks: dict[str, Any] = {"should_stop": case.rule(False), "logits_processor": case.processor(False)}
        return self._decoder.generate([case.prompt], **options, **hooks)

    def _check_slots(self) -> None:
        """As many requests as there are slots must run at once."""
        if len(self._session):
            raise Mismatch(f"the session still counts {len(self._session)} requests")
        ids = {self._session.add([1 + slot], LONGEST - 1, strategy="autoregressive") for slot in range(SLOTS)}
        begun = {update.request_id for _ in range(3) for update in self._session.step()}
        if begun != ids:
            raise Mismatch(f"{len(ids - begun)} of {SLOTS} slots were lost")
        for one in ids:
            self._session.remove(one)


@contextmanager
def interrupting(chance: random.Random) -> Iterator[None]:
    """Within the context, an op of the model is interrupted now and then, before it or when it is done."""
    names = ("draft", "speculative_round")
    ops = {name: getattr(model_module, name) for name in names}

    def interrupted(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            moment = chance.random()
            if moment < 0.002:
                raise Interrupted
            done = op(*args, **named)
            if moment > 0.998:
                raise Interrupted
            return done

        return call

    try:
        for name, op in ops.items():
            setattr(model_module, name, interrupted(op))
        yield
    finally:
        for name, op in ops.items():
            setattr(model_module, name, op)


class Signals:
    """Sends SIGINT and SIGTERM to this process at random moments; within the contexts that it gives they may raise.

    Another process sends them, so that they come at any moment. They raise `Interrupted` where a method of the session
    is on the stack, not in the lines of the caller around it, which would lose what the method has returned; and not in
    more than four calls in a row, because a slow machine would never end a step.
    """

    METHODS = tuple(getattr(Session, name).__code__ for name in ("add", "step", "cancel", "remove", "release"))
    SENDER = (
        "import os, random, sys, time\n"
        "while os.getppid() == int(sys.argv[1]):\n"
        "    time.sleep(random.expovariate(1 / float(sys.argv[2])))\n"
        "    os.kill(int(sys.argv[1]), random.choice([int(number) for number in sys.argv[3:]]))\n"
    )

    def __init__(self, seconds: float = 0.004) -> None:
        self._seconds, self._armed, self._in_a_row, self.sent = seconds, False, 0, 0

    def _handle(self, number: int, frame: Any) -> None:
        self.sent += 1
        while self._armed and frame is not None:
            if frame.f_code in self.METHODS:
                raise Interrupted
            frame = frame.f_back

    def __enter__(self) -> Signals:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        words = [sys.executable, "-c", self.SENDER, os.getpid(), self._seconds, *map(int, numbers)]
        self._sender = subprocess.Popen([str(word) for word in words])
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.kill()
        self._sender.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._armed = self._in_a_row < 4
        self._in_a_row += 1
        try:
            yield
            self._in_a_row = 0
        finally:
            self._armed = False


def resident_mib() -> float:
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run it; 0 if all is as it must be, 1 for a mismatch, 130 after Ctrl-C. The seed is printed first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="the longest that it adds requests")
    parser.add_argument("--requests", type=int, default=10_000, help="the most requests")
    parser.add_argument("--signals", type=int, help="until that many have interrupted a call; any number of requests")
    parser.add_argument("--seed", type=int, help="of an earlier run; drawn anew if it is not given")
    args = parser.parse_args(argv)
    console = Console() if console is None else console
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    console.print(f"seed {seed}", highlight=False)
    torch.set_num_threads(1)  # the model is too small for a second one
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    signals = Signals() if args.signals else None
    soak = Soak(seed, interrupts=signals)
    requests, interrupts = (sys.maxsize, args.signals) if args.signals else (args.requests, sys.maxsize)
    try:
        with signals or nullcontext(), Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=1.0)

            def show(reached: Reached, share: float) -> None:
                progress.update(bar, completed=share, description=f"{reached.compared:,} compared")

            soak.run(args.minutes, requests, show, interrupts)
    except KeyboardInterrupt:
        console.print(f"interrupted, seed {seed}\n{soak.reached}", highlight=False)
        return 130
    except Mismatch as mismatch:
        console.print(f"{mismatch}\nseed {seed}; {soak.reached}", highlight=False, markup=False)
        return 1
    console.print(str(soak.reached), highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
