"""How many tokens of prompts a step reads: simulated machines, on which a pass of n tokens takes a + b n seconds."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import pytest

from layerskip.decoding.scheduler import LONGEST_STEP, TimeBudget, TokenBudget, prefill_budget

DEPTH, PASS = 30, 256  # layers; the most tokens of a pass


@dataclass
class Machine:
    """What streaming the weights takes, what a token takes beside it, and a step's rounds."""

    stream: float
    token: float
    rounds: float
    jump: float = 0.0  # where another kernel takes over, beyond two tokens

    def pass_of(self, tokens: int, depth: int = DEPTH) -> float:
        jump = self.jump if tokens > 2 else 0.0
        return (max(1, tokens) * self.token + self.stream + jump) * depth / DEPTH


MACHINES = {
    "a pass is streaming, next to short rounds": Machine(9, 0.9, 9.9),  # one token takes as long
    "a pass is computing, next to short rounds": Machine(0.5, 6, 22),
    "next to long rounds": Machine(9, 0.9, 40),
    "next to the rounds of many": Machine(9, 0.9, 400),
}


def step(budget: TokenBudget, machine: Machine, rounds: float | None = None, noise=lambda: 1.0) -> tuple[float, int]:
    """Run one step of a session with enough prompts; return its seconds and the tokens that it read."""
    taken = (machine.rounds if rounds is None else rounds) * noise()
    budget.begin_step(taken)
    read = 0
    while most := budget.next_chunk(DEPTH):
        tokens = min(most, PASS)
        seconds = machine.pass_of(tokens) * noise()
        budget.spend(tokens, DEPTH, seconds)
        taken, read = taken + seconds, read + tokens
    return taken, read


@pytest.mark.parametrize("known", [1, 16, PASS], ids="{} tokens were read before".format)
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_steps_stay_under_three_times_and_use_the_time(machine, known):
    budget = TimeBudget()
    budget.spend(known, DEPTH, machine.pass_of(known))
    steps = [step(budget, machine) for _ in range(40)]
    assert max(taken for taken, _ in steps) <= LONGEST_STEP * machine.rounds + machine.token
    time_for = (LONGEST_STEP - 1) * machine.rounds - machine.stream
    most = time_for / machine.token
    if most > PASS:  # each further pass streams the weights again
        most = (time_for + machine.stream) / machine.pass_of(PASS) * PASS - PASS
    assert sum(read for _, read in steps[20:]) >= 0.9 * 20 * most


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_disturbed_round_does_not_extend_the_budget(machine):
    budget = TimeBudget()
    budget.spend(16, DEPTH, machine.pass_of(16))
    for _ in range(20):
        step(budget, machine)
    assert step(budget, machine, rounds=10 * machine.rounds) == (10 * machine.rounds, 0)
    assert step(budget, machine)[1] > 1


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_steps_with_longer_rounds_stay_under_three_times_the_shortest(machine):
    budget = TimeBudget()
    budget.spend(1, DEPTH, machine.pass_of(1))
    for longer in [1, 1.6, 1.9, 2.1, 2.9] * 40:
        taken, read = step(budget, machine, rounds=longer * machine.rounds)
        assert taken <= 3 * machine.rounds
        assert read > 0 or longer > 1


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_prefill_continues_with_noisy_times(machine):
    chance = random.Random(0)
    budget = TimeBudget()
    budget.spend(16, DEPTH, machine.pass_of(16))
    quiet = sum(step(budget, machine)[1] for _ in range(200))
    noisy = [step(budget, machine, noise=lambda: chance.choice([0.9, 1, 1.1, 1.2, 4])) for _ in range(200)]
    assert sum(read for _, read in noisy) >= 0.2 * quiet


def test_a_chunk_size_where_time_jumps_is_not_retried():
    """Beside steps of 13 ms, passes of one, two and three tokens of 11, 12 and 25 ms."""
    machine, budget = Machine(10, 1, 13, jump=12), TimeBudget()
    chance = random.Random(0)
    budget.spend(16, DEPTH, machine.pass_of(16))
    steps = [step(budget, machine, noise=lambda: chance.choice([0.95, 1, 1.05])) for _ in range(500)]
    assert sum(taken > 2.4 * machine.rounds for taken, _ in steps) <= 5
    assert sum(read == 2 for _, read in steps[20:]) > 460
    longer_rounds = [step(budget, machine, rounds=20) for _ in range(20)]  # which leave time for three
    assert sum(read for _, read in longer_rounds[10:]) >= 30


def test_a_disturbed_chunk_does_not_count():
    """A second one of its size says what it takes; where both were, it is tried again after a while."""
    machine, budget = Machine(17, 1, 21), TimeBudget()
    usual = [step(budget, machine)[1] for _ in range(30)][-1]
    assert usual > 5
    step(budget, machine, noise=lambda: 4)
    assert [step(budget, machine)[1] for _ in range(30)][-1] >= usual - 1
    for tokens in range(1, 20):
        for _ in range(2):
            budget.spend(tokens, DEPTH, 1000.0)
    assert step(budget, machine)[1] == 1
    assert max(step(budget, machine)[1] for _ in range(400)) >= usual - 1


def test_the_budget_follows_a_larger_batch():
    machine, budget = Machine(9, 0.9, 20), TimeBudget()
    budget.spend(16, DEPTH, machine.pass_of(16))
    for _ in range(20):
        before = step(budget, machine)[1]
    steps = [step(budget, machine, rounds=100) for _ in range(30)]
    assert all(read >= 1 for _, read in steps[7:])
    assert steps[-1][1] > 2 * before


def test_chunks_of_few_layers_predict_all_layers():
    machine, budget = MACHINES["a pass is computing, next to short rounds"], TimeBudget()
    budget.spend(PASS, 2, machine.pass_of(PASS, 2))
    assert step(budget, machine)[0] <= LONGEST_STEP * machine.rounds + machine.token


def test_a_step_without_rounds_stops_after_starting_a_request():
    budget = TimeBudget()
    budget.begin_step(None)
    budget.spend(16, DEPTH, 1.0)  # nothing ran, so nobody asked
    assert budget.next_chunk(DEPTH) == 0


def test_a_step_of_zero_time_prefills_one_token():
    budget = TimeBudget()
    budget.begin_step(0.0)  # of a clock that ticks slowly
    assert budget.next_chunk(DEPTH) == 1
    budget.spend(1, DEPTH, 0.0)
    budget.begin_step(0.0)
    assert budget.next_chunk(DEPTH) == 1


def test_a_token_budget_ignores_time():
    for given, most in ((7, 7), (None, sys.maxsize)):
        budget = prefill_budget(given)
        assert type(budget) is TokenBudget
        budget.spend(5, DEPTH, 1.0)
        for rounds in (None, 1e-9, 1e9):
            budget.begin_step(rounds)
            assert budget.next_chunk(DEPTH) == most
    budget = prefill_budget(7)
    budget.begin_step(1.0)
    budget.spend(5, DEPTH, 1.0)
    assert budget.next_chunk(DEPTH) == 2
    budget.spend(5, DEPTH, 1.0)  # a pass may be longer than was asked for
    assert budget.next_chunk(DEPTH) == 0
