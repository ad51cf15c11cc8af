"""A test that waits for ever ends."""

from __future__ import annotations

import contextlib
import time

import pytest

from .time_limit import TimeLimitError, time_limit


def waits_for_ever() -> None:
    with time_limit(0.05):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)


def test_a_wait_without_end_is_ended():
    before = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"a test took more than 0\.05 s"):
        waits_for_ever()
    assert time.monotonic() - before < 60


def test_what_ends_in_time_is_left_alone():
    with time_limit(0.05):
        ended = True
    time.sleep(0.1)
    assert ended
