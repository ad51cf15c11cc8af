"""``layerskip chat`` on a tiny model, through a pipe and in a pseudo terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import save_tiny

import layerskip
from layerskip.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'w66' %}{{ raise_exception('not w66') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}w9"
)


def save(directory: Path, **changes: int) -> str:
    save_tiny(directory, **changes)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return str(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def ask(directory, capsys, monkeypatch):
    """Answers and notes to lines of a pipe."""

    def talk(*lines: str, options: tuple[str, ...] = ("--max-new-tokens", "9"), code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", directory, "--dtype", "float32", *options]) == code
        return capsys.readouterr()

    return talk


def expected(directory: str, text: str) -> str:
    decoder = layerskip.SelfSpeculativeDecoder.from_pretrained(directory, dtype="float32")
    return "".join(decoder.stream(text, 9)) + "\n"


class TestPipe:
    def test_every_answer_continues_all_messages(self, ask, directory):
        out, err = ask("w20 w21", "", "w22")
        first = expected(directory, "user w20 w21 w9")
        second = expected(directory, f"user w20 w21 assistant {first.strip()} user w22 w9")
        assert out == first + second
        assert len(err.splitlines()) == 2
        assert err.count("9 tokens in ") == 2

    def test_commands(self, ask, directory):
        whole = f"user w20 assistant {expected(directory, 'user w20 w9').strip()} user w22 w9"
        plain = ask("w20").out
        assert ask("w20", "w21", "/undo", "w22").out.endswith(expected(directory, whole))
        assert ask("w20", "/reset", "w22").out == plain + expected(directory, "user w22 w9")
        system = expected(directory, "system w30 user w20 w9")
        assert system != plain
        assert ask("/system w30", "w20").out == ask("w20", options=("--system", "w30", "--max-new-tokens", "9")).out
        assert ask("/system w30", "w20", "/reset", "w20").out == 2 * system
        assert ask("/system w30", "/system", "w20").out == plain
        assert ask("/exit", "w20") == ("", "")
        assert ask("//exit").out == expected(directory, "user /exit w9")

    def test_stats_count_what_was_not_read_again(self, ask):
        out, err = ask("/stats", "w20 w21", "w22 w23", "/stats", "/undo", "/stats")
        assert len(out.splitlines()) == 2
        notes = err.splitlines()
        assert notes[0] == "0 messages in 0 of 256 tokens"
        assert notes[3].startswith("2 messages in ")
        (new, reused, read) = map(int, re.findall(r": (\d+) tokens in .* s; (\d+) of (\d+) prompt", notes[4])[0])
        assert new == 18
        assert 0 < reused < read
        assert [note for note in notes if note.startswith("1 messages in ")]

    def test_help_lists_the_commands(self, ask):
        out, err = ask("/help")
        assert out == ""
        assert [line.split()[0] for line in err.splitlines()] == [
            "/undo", "/reset", "/system", "/stats", "/help", "/exit",
        ]  # fmt: skip

    def test_the_oldest_messages_are_dropped(self, ask, directory):
        options = ("--max-new-tokens", "9", "--max-seq-len", "40")
        long = " ".join(f"w{number}" for number in range(20, 35))
        out, err = ask(long, "w40", "w41 " + long, options=options)
        assert out.splitlines()[2] + "\n" != expected(directory, f"user w41 {long} w9")
        middle = out.splitlines()[1]
        assert out.splitlines()[2] + "\n" == expected(directory, f"user w40 assistant {middle} user w41 {long} w9")
        assert err.count(" tokens in ") == 3

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/undo", "there is no message to take back"),
            ("/rest", "unknown command /rest; did you mean /reset"),
            ("w66", "the model's chat template refuses the messages: not w66"),
            ("w20 " * 300, "more than max_seq_len=256"),
        ],
        ids=["undo", "unknown", "template", "length"],
    )
    def test_an_error_ends_the_command(self, ask, line, message):
        out, err = ask(line, "w20", code=2)
        assert out == ""
        assert err.startswith("layerskip chat: ")
        assert message in err
        assert err.count("\n") == 1

    def test_a_model_without_a_chat_template_is_refused(self, tmp_path, capsys):
        save_tiny(tmp_path)
        assert main(["chat", str(tmp_path)]) == 2
        assert "no chat template; layerskip generate" in capsys.readouterr().err


# Ctrl-C is a signal to the processes that this terminal controls.
IN_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from layerskip.cli import main
sys.exit(main())
"""


class Terminal:
    """Run the command in a pseudo terminal, and read its output."""

    def __init__(self, *words: str) -> None:
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("NO_COLOR", None)
        self._end, other = pty.openpty()
        command = [sys.executable, "-c", IN_TERMINAL, "chat", *words]
        self._process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        self.shown = ""

    def until(self, text: str, seconds: float = 30) -> str:
        """Read and return the output before the next ``text``."""
        assert self.shows(text, seconds), f"{text!r} did not come, but {self.shown[-500:]!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def shows(self, text: str, seconds: float) -> bool:
        """Return whether ``text`` comes within ``seconds``; `until` still finds it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            if not select.select([self._end], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            self.shown += os.read(self._end, 4096).decode()
        return True

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def ended(self) -> int:
        return self._process.wait(60)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(tmp_path) -> Iterator[Terminal]:
    # A context that takes long to fill.
    model = save(tmp_path, max_position_embeddings=1 << 16)
    one = Terminal(model, "--dtype", "float32", "--max-seq-len", "60000", "--draft-source", "ngram")
    try:
        yield one
    finally:
        one.close()


def test_a_terminal(terminal):
    terminal.until("/help shows the commands")
    terminal.until("> ")
    terminal.type("w20 w21\n")
    terminal.until("w20 w21\r\n")
    terminal.until("\x1b[1;32m")  # it answers, and an accepted draft token is green
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.until("> ")
    terminal.type("/stats\n")
    terminal.until("1 messages in ")
    assert int(terminal.until(" of 60000 tokens")) > 4, "the message and the part of the answer"
    terminal.until("> ")
    terminal.type("/rest\n")
    terminal.until("did you mean /reset")
    terminal.until("> ")
    terminal.type("dropped")
    terminal.until("dropped")
    # readline waits for a key before it looks for a signal that came while it drew the last one: press until it reacts.
    while not terminal.shows("> ", seconds=2):
        terminal.type("\x03")  # drops the line
    terminal.until("> ")
    terminal.type("w22\n")
    terminal.until("w22\r\n")
    terminal.until(" w")
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.until("> ")
    terminal.type("\x1b[A\x1b[A\n")  # the line before the last one, of the history
    terminal.until("did you mean /reset")
    terminal.until("> ")
    terminal.type("/stats\n")
    terminal.until("2 messages in ")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.ended() == 0


def test_an_interrupt_ends_it_in_a_pipe(tmp_path):
    words = [save(tmp_path, max_position_embeddings=1 << 16), "--dtype", "float32", "--max-seq-len", "60000"]
    command = [sys.executable, "-m", "layerskip.cli", "chat", *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        run.stdin.write("w20\n")
        run.stdin.flush()
        run.stdout.read(5)  # it answers
        run.send_signal(2)
        _, err = run.communicate(timeout=60)
        assert run.returncode == 130
        assert err == "interrupted\n"
