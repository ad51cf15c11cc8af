"""A parser that tells mistakes in one line, and the types of what it takes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..registry import nearest


class Parser(argparse.ArgumentParser):
    """Says a default once, at the end of an option's help, and an error in one line."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As argparse has it. A default that the help does not tell in words is added to it."""
        default, text = settings.get("default"), settings.get("help", "")
        if default and default != argparse.SUPPRESS and "default" not in text:
            settings["help"] = f"{text} (default: %(default)s)"
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def refuse(self, word: str) -> NoReturn:
        """Exit for what no option or argument takes; the nearest option is told."""
        name = word.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        text = re.sub(r"\x1b\[[\d;]*m", "", self.format_help())  # later versions of argparse colour it
        options = dict.fromkeys(re.findall(r"(?<!\w)--?[a-z][a-z-]*", text))
        self.error(f"unknown option {name}; {nearest(name, options)}")


def positive(text: str) -> int:
    """An argparse type: an int from 1 up."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_or_auto(text: str) -> int | str:
    """An argparse type: "auto", or an int from 1 up."""
    return text if text == "auto" else positive(text)


def whole(text: str) -> int:
    """An argparse type: an int."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def number(text: str) -> float:
    """An argparse type: a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def one_of(what: str, names: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of some names; for another one the nearest are told."""

    def parse_name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}; {nearest(text, names)}")
        return text

    return parse_name


def device(text: str) -> str:
    """An argparse type: what looks like a device; whether it is there, torch will know."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"unknown device {text!r}, expected auto, cpu, cuda or cuda:N")
    return text
