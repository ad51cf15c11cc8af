"""A short run of `make soak`, and that it detects wrong results."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

import layerskip_kernels
from layerskip import DraftSource
from layerskip.decoding.session import Session
from layerskip.models import model as model_module
from layerskip_kernels import _extension
from tools import soak
from tools.soak import LONGEST, VOCABULARY, Mismatch, Soak, case_of

pytestmark = pytest.mark.skipif(
    _extension.cpu_reason is not None, reason=f"the reference is not bitwise batch invariant; {_extension.cpu_reason}"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_seconds(seed: int) -> None:
    reached = Soak(seed).run(minutes=10 / 60, requests=10_000)
    assert reached.compared == reached.requests - reached.removed > 20
    assert 0 < reached.sampled < reached.compared
    assert reached.tokens > reached.accepted > 0


def test_requests_are_as_various_as_they_should_be() -> None:
    cases = [case_of(3, index) for index in range(400)]
    assert cases == [case_of(3, index) for index in range(400)]
    assert all(len(case.prompt) + case.options["max_new_tokens"] <= LONGEST for case in cases)
    for wanted in (
        lambda case: case.options["strategy"] == "early_exit",
        lambda case: case.options["exit_layer"] == "auto",
        lambda case: case.options["num_speculations"] == "auto",
        lambda case: case.options["draft_source"] == "auto",
        lambda case: case.options["draft_source"] == "ngram" and case.sampled,
        lambda case: isinstance(case.options["draft_source"], DraftSource) and case.sampled,
        lambda case: case.options["draft_threshold"] and case.sampled,
        lambda case: case.sampled and case.options["sampling"].processes,
        lambda case: case.processed and case.interrupt,
        lambda case: case.processed and case.fault,
        lambda case: not case.processed and case.fault,
        lambda case: case.stop_after,
        lambda case: case.options["eos_token_id"],
    ):
        assert sum(bool(wanted(case)) for case in cases) >= 2


def test_a_wrong_round_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth round gives its first sequence another token."""
    calls = 0

    def wrong(*args, **named):
        nonlocal calls
        calls += 1
        done = layerskip_kernels.speculative_round(*args, **named)
        if calls % 5 == 0:
            done.next_token[0] = (done.next_token[0] + 1) % VOCABULARY
        return done

    monkeypatch.setattr(model_module, "speculative_round", wrong)
    with pytest.raises(Mismatch, match=r"^Case.* gave \[.*, alone \["):
        Soak(1).run(minutes=1, requests=50)


def test_requests_without_an_end_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "step", lambda self: [])
    with pytest.raises(Mismatch, match="12 requests have had no update for 200 steps"):
        Soak(1).run(minutes=1, requests=50)


def test_memory_that_grows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    grows = iter((100.0, 130.0))
    monkeypatch.setattr(soak, "resident_mib", lambda: next(grows))
    with pytest.raises(Mismatch, match="memory grew by 30 MiB after warming up"):
        Soak(1).run(minutes=1, requests=10)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted, seed 5\n0 requests in"),
        (Mismatch("[1, 2]"), 1, "[1, 2]\nseed 5; 0 requests in"),
        (None, 0, "0 requests in 0.0 min: 0 as their single runs"),
    ],
)
def test_the_seed_comes_first_and_what_was_reached_last(
    error: BaseException | None, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self, *args) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(Soak, "run", run)
    console = Console(file=io.StringIO(), width=1000)
    assert soak.main(["--seed", "5"], console) == code
    assert console.file.getvalue().startswith("seed 5\n")
    assert words in console.file.getvalue()
