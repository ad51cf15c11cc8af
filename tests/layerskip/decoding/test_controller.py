"""The controller: learned costs and acceptance rates, and its speed against the best fixed choice."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import prompt_of, tiny_model

from layerskip import SelfSpeculativeDecoder
from layerskip.decoding.adaptive import (
    UNTRIED_PROPOSAL,
    UNTRIED_RATIO,
    AcceptanceRates,
    Choice,
    Controller,
    CostModel,
    Proposal,
    Rate,
    Sizes,
    default_exits,
    expected_tokens,
)
from layerskip.decoding.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 32
SIZES = Sizes(layer=100, head=600, draft_head=600, num_layers=LAYERS)
EXITS = default_exits(LAYERS)
MOST = 12


def tokens_of_round(rate: float, num_speculations: int) -> float:
    """What a round gives on average: token i + 1 comes if the i drafts before it are all accepted, each by a coin."""
    return sum(rate**accepted for accepted in range(num_speculations + 1))


def seconds(choice: Choice) -> float:
    """What a round costs in the tests: not quite what the bytes suggest, since drafts have an overhead of their own."""
    draft = (choice.exit_layer or 0) * 100 + 600 + 150
    deep = (LAYERS - (choice.exit_layer or 0)) * 100 + 600
    return 1e-6 * (choice.num_speculations * draft + LAYERS * 100 + 600 + 200 + 0.08 * choice.num_speculations * deep)


class SyntheticModel:
    """A sequence whose drafts are accepted by coins, one for each exit; ``shift`` changes them."""

    def __init__(self, rates: dict[int, float], seed: int = 0) -> None:
        self.rates, self._random = rates, random.Random(seed)

    def round(self, choice: Choice) -> int:
        """How many drafts are accepted."""
        accepted = 0
        while accepted < choice.num_speculations and self._random.random() < self.rates[choice.exit_layer]:
            accepted += 1
        return accepted


def simulate(controller: Controller, models: list[SyntheticModel], rounds: int, noise: random.Random | None = None):
    """Tokens a second that are expected of the controller's choices, and the choices."""
    acceptances = [controller.new_acceptance() for _ in models]
    tokens, clock, choices = 0.0, 0.0, []
    for _ in range(rounds):
        choice = controller.choose(acceptances)
        took = seconds(choice)
        if noise is not None:
            took *= 10 if noise.random() < 0.02 else noise.uniform(0.9, 1.1)
        controller.observe_cost(choice, len(models), took)
        for model, acceptance in zip(models, acceptances, strict=True):
            acceptance.observe(choice.exit_layer, model.round(choice), choice.num_speculations)
            tokens += tokens_of_round(model.rates[choice.exit_layer], choice.num_speculations)
        clock += seconds(choice)
        choices.append(choice)
    return tokens / clock, choices


def expected_speed(rates: dict[int, float], choice: Choice) -> float:
    return tokens_of_round(rates[choice.exit_layer], choice.num_speculations) / seconds(choice)


def sweep(rates: dict[int, float]) -> dict[Choice, float]:
    """Tokens a second of every fixed choice that drafts."""
    choices = [Choice(exit_layer, count) for exit_layer in EXITS for count in range(1, MOST + 1)]
    return {choice: expected_speed(rates, choice) for choice in choices}


TASKS = {
    "trained to exit early": dict(zip(EXITS, (0.85, 0.9, 0.93, 0.96), strict=True)),
    "useful from the middle on": dict(zip(EXITS, (0.2, 0.5, 0.85, 0.9), strict=True)),
    "hardly useful": dict(zip(EXITS, (0.05, 0.2, 0.4, 0.6), strict=True)),
}


@pytest.mark.parametrize("task", TASKS)
def test_it_is_within_5_percent_of_the_best_fixed_choice(task):
    speeds = sweep(TASKS[task])
    speed, _ = simulate(Controller(SIZES, EXITS), [SyntheticModel(TASKS[task])], 3000, random.Random(1))
    assert speed > 0.95 * max(speeds.values())
    assert speed > 1.3 * min(speeds.values())


def test_it_follows_a_shift_of_acceptance():
    before, after = TASKS["trained to exit early"], TASKS["useful from the middle on"]
    model = SyntheticModel(dict(before))
    controller = Controller(SIZES, EXITS)
    acceptance = controller.new_acceptance()
    late: dict[str, list[Choice]] = {"before": [], "after": []}
    for index in range(1200):
        if index == 600:
            model.rates = dict(after)
        choice = controller.choose([acceptance])
        controller.observe_cost(choice, 1, seconds(choice))
        acceptance.observe(choice.exit_layer, model.round(choice), choice.num_speculations)
        if index % 600 >= 300:
            late["before" if index < 600 else "after"].append(choice)
    for name, rates in (("before", before), ("after", after)):
        best = max(sweep(rates).values())
        speeds = [expected_speed(rates, choice) for choice in late[name]]
        assert sum(speeds) / len(speeds) > 0.95 * best, name
    assert max(set(late["before"]), key=late["before"].count).exit_layer == EXITS[0]
    assert max(set(late["after"]), key=late["after"].count).exit_layer == EXITS[2]


def test_it_stops_drafting_when_no_draft_is_accepted():
    rates = dict.fromkeys(EXITS, 0.01)
    speed, choices = simulate(Controller(SIZES, EXITS), [SyntheticModel(rates)], 600)
    late = choices[200:]
    assert late.count(late[0]) > 0.9 * len(late)
    assert late[0].num_speculations == 0
    assert speed > 0.95 / seconds(Choice(EXITS[0], 0))


def test_exploration_is_bounded():
    """At most every 32nd round is not the best known, with at most 3 drafts; an exit that can't win is left alone."""
    rates = dict(zip(EXITS, (0.93, 0.94, 0.95, 0.96), strict=True))
    _, choices = simulate(Controller(SIZES, EXITS), [SyntheticModel(rates)], 1600)
    explored = [choice for index, choice in enumerate(choices, start=1) if index % 32 == 0 and index > 400]
    others = [choice for index, choice in enumerate(choices, start=1) if index % 32 and index > 400]
    assert sum(choice.exit_layer == EXITS[0] for choice in others) > 0.99 * len(others)
    tries = [choice for choice in explored if choice.exit_layer != EXITS[0]]
    assert len(tries) > 5
    assert all(choice.num_speculations <= 3 for choice in tries)
    assert all(choice.exit_layer != EXITS[-1] for choice in tries), "even an acceptance of 1 would not pay there"


def test_fixed_values_are_kept():
    controller = Controller(SIZES, EXITS)
    acceptance = controller.new_acceptance()
    for _ in range(40):
        assert controller.choose([acceptance], 5).exit_layer == 5
        assert controller.choose([acceptance], None, 7).num_speculations == 7
        acceptance.observe(5, 2, 4)


def test_a_new_sequence_starts_from_shared_rates():
    controller = Controller(SIZES, EXITS)
    _, first = simulate(controller, [SyntheticModel(TASKS["useful from the middle on"])], 500)
    _, second = simulate(controller, [SyntheticModel(TASKS["useful from the middle on"])], 8)
    assert second[0].exit_layer == EXITS[2] != first[0].exit_layer


def test_the_sequences_of_a_batch_share_the_choice():
    """One of them alone would take another exit; together they take the one of the most tokens a second."""
    easy, hard = TASKS["trained to exit early"], TASKS["useful from the middle on"]
    models = [SyntheticModel(easy, 1), SyntheticModel(hard, 2), SyntheticModel(hard, 3), SyntheticModel(hard, 4)]
    speed, _ = simulate(Controller(SIZES, EXITS), models, 1500)

    def together(choice: Choice) -> float:
        rates = [easy[choice.exit_layer]] + [hard[choice.exit_layer]] * 3
        return sum(tokens_of_round(rate, choice.num_speculations) for rate in rates) / seconds(choice)

    best = max(sweep(easy), key=together)
    assert best.exit_layer == EXITS[2]
    assert speed > 0.95 * together(best)


class TestRate:
    def test_it_is_the_mean_of_remembered_trials(self):
        rate = Rate(0.5, 2, memory=1000)
        for success in [True] * 30 + [False] * 10:
            rate.observe(success)
        assert rate.mean == pytest.approx((1 + 30) / (2 + 40))
        assert rate.weight == 42

    def test_old_trials_fade(self):
        rate = Rate(0.5, 2, memory=20)
        for success in [True] * 500 + [False] * 100:
            rate.observe(success)
        assert rate.mean < 0.01
        assert rate.weight == 20

    def test_optimism_shrinks_with_trials_and_grows_with_neglect(self):
        rate = Rate(0.2, 1, memory=100)
        hopes = [rate.optimistic]
        for success in [True] + [False] * 4:
            rate.observe(success)
        hopes.append(rate.optimistic - rate.mean + 0.2)
        for _ in range(100):
            rate.fade()
        hopes.append(rate.optimistic - rate.mean + 0.2)
        assert hopes[0] > hopes[1] < hopes[2]
        assert Rate(1.0, 1, 10).optimistic == 1.0


def test_the_formula_of_expected_tokens():
    for rate in (0.0, 0.3, 0.9):
        closed = [(1 - rate ** (count + 1)) / (1 - rate) for count in range(6)]
        assert expected_tokens([rate] * 5) == pytest.approx(closed)
    assert expected_tokens([1.0, 0.5, 0.0, 1.0]) == [1, 2, 2.5, 2.5, 2.5]


class TestCosts:
    def test_untried_costs_follow_from_bytes(self):
        model = CostModel(SIZES)
        total = LAYERS * 100 + 600
        assert model.seconds(8, 0) == pytest.approx(UNTRIED_RATIO)
        expected = 1 + (3 * 1400 + 0.05 * 3 * (24 * 100 + 600)) / total
        assert model.seconds(8, 3) == pytest.approx(UNTRIED_RATIO * expected), "untried rounds are worth a try"

    def test_it_learns_what_was_measured_and_predicts_the_rest(self):
        model = CostModel(SIZES)
        for _ in range(30):
            for choice in (Choice(4, 2), Choice(8, 4), Choice(16, 1)):
                model.observe(*choice, seconds(choice))
        for choice in (Choice(4, 2), Choice(8, 4)):
            assert model.seconds(*choice) == pytest.approx(seconds(choice), rel=0.03)
        for choice in (Choice(4, 8), Choice(8, 1), Choice(24, 4)):
            assert model.seconds(*choice) == pytest.approx(seconds(choice), rel=0.15)

    def test_it_learns_expensive_rows(self):
        """On a machine where a further row costs a quarter of the first, and three cost more than they should."""
        model, rows = CostModel(SIZES), {1: 1.0, 2: 1.1, 3: 1.64, 5: 2.05, 13: 3.98}
        for _ in range(3):
            for count, passes in rows.items():
                model.observe(None, count - 1, passes)
        for count, passes in rows.items():
            assert model.seconds(None, count - 1) == pytest.approx(passes, rel=0.06)
        assert model.seconds(None, 8) == pytest.approx(UNTRIED_RATIO * 2.9, rel=0.06), "as its neighbours let expect"
        assert CostModel(SIZES).seconds(None, 12) < 1.6, "nothing is known of it before"

    def test_an_interrupted_round_is_an_outlier(self):
        model, choice = CostModel(SIZES), Choice(8, 4)
        for index in range(60):
            model.observe(*choice, seconds(choice) * (100 if index == 50 else 1))
        assert model.seconds(*choice) == pytest.approx(seconds(choice), rel=0.05)


def test_default_exits():
    assert default_exits(32) == (4, 8, 16, 24)
    assert default_exits(4) == (1, 2, 3)
    assert default_exits(2) == (1,)


class Clock:
    """Seconds that pass as a session's rounds say."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("options", [{"exit_layer": "auto"}, {"num_speculations": "auto"}, {}], ids=str)
def test_a_session_lets_it_choose_without_changing_tokens(options, monkeypatch):
    """A model whose layers after the first add nothing: every draft is accepted, so many drafts at E = 1 are best."""
    from layerskip.decoding.batch import Batch

    plan = options or {"exit_layer": "auto", "num_speculations": "auto"}
    decoder = SelfSpeculativeDecoder(tiny_model(upper="silent"), 2, 3)
    plain = decoder.generate(prompt_of(5), 200, strategy="autoregressive", eos_token_id=[])
    clock, choices = Clock(), []

    def timed(self, _read=Batch.read):
        launched, results = _read(self)
        clock.now += seconds(Choice(self.kind.exit_layer * 8, launched.num_speculations))  # as if of 32 layers
        choices.append(Choice(self.kind.exit_layer, launched.num_speculations))
        return launched, results

    monkeypatch.setattr(Batch, "read", timed)
    cache = decoder.model.decoder.new_cache(1, 256)
    session = Session(decoder.model, cache, decoder.defaults, decoder.controller, 240, 12, clock=clock)
    for _ in range(2):  # the first time it finds out
        started = clock.now
        choices.clear()
        session.add(prompt_of(5), 200, eos_token_id=[], draft_source="exit", **plan)
        outputs = []
        while len(session):
            outputs += [update.output for update in session.step()]
        assert torch.equal(outputs[-1].sequences, plain.sequences)
        assert outputs[-1].stats.seconds == pytest.approx(clock.now - started)
    exits, counts = zip(*choices[:-1], strict=True)  # the last round has fewer tokens left
    assert (set(exits) == {2}) == ("exit_layer" not in plan)
    assert (set(counts) == {3}) == ("num_speculations" not in plan)
    if "exit_layer" in plan:
        assert exits.count(1) > len(exits) / 2
    if "num_speculations" in plan:
        assert sum(counts) > 9 * len(counts), "of at most 12"


def test_catching_up_must_pay_off():
    """Drafts that gain 2 % are not worth 5 % of a pass; an exit without draft layers has nothing to catch up."""
    for num_draft_layers, expected in ((0, 1), (1, 0)):
        controller = Controller(Sizes(100, 600, 600, LAYERS, num_draft_layers), [1], 1)
        acceptance = controller.new_acceptance()
        rate = acceptance.at(1)
        rate.mean, rate.weight = 0.26, 1000.0
        assert controller.choose([acceptance]) == Choice(1, 1)
        acceptance.lag = 1
        assert controller.choose([acceptance]) == Choice(1, expected)


def test_each_sequence_catches_up_by_itself():
    """What eight sequences have to read costs eight passes, so that drafts gain less than one such pass each."""
    for behind, expected in ((0, 1), (1, 1), (8, 0)):
        controller = Controller(Sizes(100, 600, 600, LAYERS, 1), [1], 1)
        acceptances = [controller.new_acceptance() for _ in range(8)]
        for number, acceptance in enumerate(acceptances):
            rate = acceptance.at(1)
            rate.mean, rate.weight = 0.4, 1000.0
            acceptance.lag = 20 if number < behind else 0
        assert controller.choose(acceptances) == Choice(1, expected)


def test_trials_update_the_shared_rates():
    shared: dict[int, Rate] = {}
    one, other = AcceptanceRates(shared), AcceptanceRates(shared)
    before = other.at(4).mean
    for _ in range(20):
        one.observe(4, 0, 3)
    assert one.at(4).mean < 0.1
    assert other.at(4).mean == before, "its own trials count, once it has begun"
    assert AcceptanceRates(shared).at(4).mean < 0.2


def test_a_proposal_is_judged_up_to_its_first_mistake():
    """What comes after it follows other tokens than it was meant for."""
    rates, proposal = AcceptanceRates({}), Proposal([5, 6, 7], "text", 3)
    rates.observe_proposal(proposal, [5, 8, 7])
    assert [rates.at(proposal.rate_key(place)).weight for place in range(3)] == [2.0, 2.0, 1.0]
    assert rates.at(proposal.rate_key(0)).mean > UNTRIED_PROPOSAL > rates.at(proposal.rate_key(1)).mean


class LookupModel:
    """A sequence in which text is found now and then: of each round's proposal, coins say how much is right."""

    def __init__(self, exits: dict[int, float], found: dict[int, tuple[float, float]], seed: int = 0) -> None:
        """``found``: by the length of the match, how often there is one, and how probable its tokens are."""
        self._exits, self._found, self._random = exits, found, random.Random(seed)

    def propose(self) -> Proposal:
        """What is found for the next round."""
        luck = self._random.random()
        for match, (share, _) in self._found.items():
            luck -= share
            if luck < 0:
                return Proposal([0] * 12, "ngram", match)
        return Proposal([], "ngram")

    def rate(self, choice: Choice, proposal: Proposal) -> float:
        """Of the drafts that this choice makes."""
        return self._exits[choice.exit_layer] if choice.exit_layer else self._found.get(proposal.match, (0, 0))[1]

    def right(self, proposal: Proposal) -> list[int]:
        """The tokens that the model writes, where the source proposes 0, 0, 0, …"""
        rate, count = self._found.get(proposal.match, (0, 0))[1], 0
        while count < len(proposal.tokens) and self._random.random() < rate:
            count += 1
        return [0] * count + [1]


def cost(choice: Choice) -> float:
    if choice.exit_layer:
        return seconds(choice)
    return 1e-6 * (LAYERS * 100 + 800) * (1 + 0.08 * choice.num_speculations)


def decode(model: LookupModel, sources: set[str], rounds: int = 4000) -> tuple[float, list[Choice]]:
    """Tokens a second of rounds with some sources, and the choices."""
    controller, tokens, clock, choices = Controller(SIZES, EXITS), 0.0, 0.0, []
    acceptance = controller.new_acceptance()
    for number in range(rounds):
        proposal = model.propose() if "ngram" in sources else Proposal([], "ngram")
        if sources == {"exit"}:
            choice = controller.choose([acceptance])
        else:
            choice, _ = controller.choose_with_lookups([acceptance], [proposal], exits="exit" in sources)
        controller.observe_cost(choice, 1, cost(choice))
        written = model.right(proposal)
        emitted = written[: choice.num_speculations + 1]
        if choice.exit_layer:
            accepted = SyntheticModel({choice.exit_layer: model.rate(choice, proposal)}, number).round(choice)
            acceptance.observe(choice.exit_layer, accepted, choice.num_speculations)
            emitted = [1] * (accepted + 1) if written == [1] else written[: accepted + 1]
        acceptance.observe_proposal(proposal, emitted)
        if number > rounds // 8:
            tokens += tokens_of_round(model.rate(choice, proposal), choice.num_speculations)
            clock += cost(choice)
        choices.append(choice)
    return tokens / clock, choices


USELESS = dict.fromkeys(EXITS, 0.02)
GOOD = TASKS["trained to exit early"]
FOUND = Proposal([0] * 3, "found", 1)
NOTHING: dict[int, tuple[float, float]] = {}
RARE = {1: (0.3, 0.05), 3: (0.02, 0.3)}
OFTEN = {1: (0.2, 0.2), 2: (0.1, 0.5), 3: (0.2, 0.7), 8: (0.3, 0.95)}


@pytest.mark.parametrize("found", [NOTHING, RARE, OFTEN], ids=["nothing", "rare", "often"])
@pytest.mark.parametrize("exits", [USELESS, GOOD, TASKS["hardly useful"]], ids=["useless", "good", "hardly useful"])
def test_both_sources_together_lose_at_most_3_percent(exits, found):
    """Against the better one alone."""
    both, _ = decode(LookupModel(exits, found), {"exit", "ngram"})
    alone = [decode(LookupModel(exits, found), {source})[0] for source in ("exit", "ngram")]
    assert both > 0.97 * max(alone)


def test_useless_exits_are_abandoned_for_lookup():
    _, choices = decode(LookupModel(USELESS, OFTEN), {"exit", "ngram"})
    late = choices[500:]
    assert sum(choice.exit_layer is None for choice in late) > 0.98 * len(late)


def test_the_number_of_drafts_follows_the_match():
    controller = Controller(SIZES, EXITS)
    acceptance = controller.new_acceptance()
    rates = random.Random(1)
    for _ in range(300):
        for match, rate in ((1, 0.1), (2, 0.5), (8, 0.95)):
            right = 0
            while right < 12 and rates.random() < rate:
                right += 1
            acceptance.observe_proposal(Proposal([0] * 12, "ngram", match), [0] * right + [1])
    counts = [
        controller.choose_with_lookups([acceptance], [Proposal([0] * 12, "ngram", match)], exits=False)[
            0
        ].num_speculations
        for match in (1, 2, 8)
    ]
    assert counts[0] <= counts[1] < counts[2] == 12


def test_a_batch_mixes_sources():
    """The exit, which is cheap, is good for one sequence; for the other what was found is."""
    controller = Controller(Sizes(layer=100, head=600, draft_head=50, num_layers=LAYERS), [1])
    one, other = controller.new_acceptance(), controller.new_acceptance()
    for _ in range(100):
        one.observe(1, 8, 8)
        other.observe(1, 0, 8)
        one.observe_proposal(FOUND, [1])
        other.observe_proposal(FOUND, [0] * 4)
    choice, lookups = controller.choose_with_lookups([one, other], [FOUND] * 2)
    assert choice.exit_layer == 1
    assert choice.num_speculations > 3
    assert lookups == [None, 3]
