"""A bound on the time of a test, so that one that waits for ever fails by name and the others still run."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 900  # of a test without the mark `time_limit`
AGAIN = 5.0  # seconds, after which a test is interrupted once more: hypothesis runs a failed example again


class TimeLimitError(BaseException):
    """Not an `Exception`, which code under test may catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitError` in the main thread after ``seconds``; end the process if compiled code does not return."""

    def expire(signum: int, frame: object) -> None:
        raise TimeLimitError(f"a test took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    faulthandler.dump_traceback_later(2 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
