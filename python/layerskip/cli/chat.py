"""Talk to a model in a terminal: answers go to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console

from .._imports import printable
from ..decoding import Session, Stats
from ..registry import nearest
from . import options
from .rendering import Drafts, TextPrinter, stats_line

COMMANDS = {
    "/undo": "take the last message and its answer back",
    "/reset": "forget all messages but the system message",
    "/system": "TEXT: replace the system message; without a text remove it",
    "/stats": "tokens, speed and drafts of all answers",
    "/help": "show this; //… sends a message that begins with a slash",
    "/exit": "end the chat, like Ctrl-D; Ctrl-C stops an answer and keeps its text so far",
}
PROMPT = "> "


def run(args: argparse.Namespace, console: Console) -> int:
    """Answer line by line until the input ends."""
    errors = Console(stderr=True)
    sampling = options.sampling(args)
    model, tokenizer = options.load(args, errors)
    decoder = options.decoder(args, model)
    session = decoder.open_session(1, max_seq_len=options.max_seq_len(args, decoder))
    chat = Chat(session, tokenizer, args.system, {"sampling": sampling, "max_new_tokens": args.max_new_tokens})
    chat.encode([{"role": "user", "content": "?"}])  # a model without a chat template is refused now
    terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def note(text: str) -> None:
        errors.print(printable(text), style="dim", markup=False, highlight=False, soft_wrap=True)

    if terminal:
        note(f"{args.model}; /help shows the commands")
    for line in _terminal_lines() if terminal else sys.stdin:
        text = line.strip()
        if text == "/exit":
            break
        try:
            if text.startswith("/") and not text.startswith("//"):
                for answer in chat.command(text):
                    note(answer)
            elif text:
                note(stats_line(chat.answer(text[1:] if text.startswith("//") else text, console)))
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            note("stopped")
        except ValueError as error:  # such as a message that is too long
            if not terminal:
                raise
            note(str(error))
    return 0


def _terminal_lines() -> Iterator[str]:
    with suppress(ImportError):  # not in every Python; it gives `input` a history and keys to edit a line
        import readline  # noqa: F401
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # drops the line
            print()
            continue
        yield line


class Chat:
    """Messages in the model's chat template.

    Every turn applies the template to all messages, because a template may change earlier ones. The session prefills
    only the tokens after the prefix that is in its KV cache. If the messages do not fit, the oldest are dropped.
    """

    def __init__(self, session: Session, tokenizer: Any, system: str | None, how: dict[str, Any]) -> None:
        self._session, self._tokenizer, self._system, self._how = session, tokenizer, system, how
        self.messages: list[dict[str, str]] = []
        self._stats: list[Stats] = []

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        text = options.chat_text(self._tokenizer, [*system, *messages])
        text.encode()  # a lone surrogate, of a terminal that is not UTF-8, is no text
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def answer(self, text: str, console: Console) -> Stats:
        """Print the answer to a message; KeyboardInterrupt keeps the part that was printed."""
        messages = [*self.messages, {"role": "user", "content": text}]
        limit, most = self._session.max_seq_len, self._how["max_new_tokens"]
        reserve = limit // 4 if most is None else most
        while len(tokens := self.encode(messages)) + reserve > limit and len(messages) > 2:
            del messages[:2]
        self._session.add(tokens, keep=True, **self._how)
        printer = TextPrinter(self._tokenizer, console=console)
        printer.start_after(tokens)
        output = None
        try:
            for update in self._session.run():
                for token, drafted in zip(update.tokens, update.drafted, strict=True):
                    printer.push(token, drafted)
                output = update.output
            printer.end()
        finally:
            for unfinished in self._session.unfinished:
                self._session.remove(unfinished)
            if printer.text:
                self.messages = [*messages, {"role": "assistant", "content": printer.text.removesuffix("\n")}]
        assert output is not None
        self._stats.append(output.stats)
        return output.stats

    def command(self, line: str) -> Iterator[str]:
        """Do what a line that begins with a slash says; yield lines to show."""
        name, _, text = line.partition(" ")
        if name == "/undo":
            if not self.messages:
                raise ValueError("there is no message to take back")
            del self.messages[-2:]
        elif name == "/reset":
            self.messages = []
        elif name == "/system":
            self._system = text.strip() or None
        elif name == "/stats":
            yield from self._summary()
        elif name == "/help":
            for command, does in COMMANDS.items():
                yield f"{command:8} {does}"
        else:
            raise ValueError(f"unknown command {name}; {nearest(name, COMMANDS)}")

    def _summary(self) -> Iterator[str]:
        length = len(self.encode(self.messages)) if self.messages else 0
        yield f"{len(self.messages) // 2} messages in {length} of {self._session.max_seq_len} tokens"
        if self._stats:
            new = sum(one.new_tokens for one in self._stats)
            seconds = sum(one.seconds for one in self._stats)
            read, reused = sum(one.prompt_tokens for one in self._stats), sum(one.reused for one in self._stats)
            answers = f"{len(self._stats)} answers: {new} tokens in {seconds:.2f} s"
            yield f"{answers}; {reused} of {read} prompt tokens reused"
            if drafts := str(Drafts.sum(map(Drafts.of, self._stats))):
                yield f"drafts accepted: {drafts}"
