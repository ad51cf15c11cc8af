"""Replayed decoding: it is what decoding does, and on recorded texts "auto" keeps up with the better single source."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import prompt_of, requires_native, tiny_model

from benchmarks.replay import MACHINES, SMOLLM2, Machine, Match, Trace, main, read, replay
from layerskip import SelfSpeculativeDecoder
from layerskip.decoding.adaptive import CATCH_UP, Choice, Controller
from layerskip.decoding.batch import Batch
from layerskip.decoding.request import DraftKind
from layerskip.decoding.session import Session
from layerskip.training.exit_analysis import analyze_exits

KINDS = read()
LOSS = 0.03  # what "auto" may lose to the better single source
NEW = 90


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", KINDS)
def test_auto_loses_little_to_the_better_source(kind, machine):
    """Though it begins with nothing known, and each kind has few texts."""
    speeds = {source: replay(KINDS[kind], source, MACHINES[machine]).speed for source in ("exit", "ngram", "auto")}
    assert speeds["auto"] > (1 - LOSS) * max(speeds["exit"], speeds["ngram"]), speeds


@pytest.mark.parametrize("machine", MACHINES)
def test_no_source_is_slower_than_none(machine):
    """By more than the cost of exploration."""
    for kind, traces in KINDS.items():
        for source in ("exit", "ngram", "auto"):
            assert replay(traces, source, MACHINES[machine]).speed > 1 - LOSS, (kind, source)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", KINDS)
def test_ngrams_keep_up_with_the_best_fixed_number_of_drafts(kind, machine):
    """Whatever a further row costs: the drafted part of a proposal depends on the match and the machine."""
    best = max(speed_of_at_most(count, KINDS[kind], MACHINES[machine]) for count in range(1, 13))
    assert replay(KINDS[kind], "ngram", MACHINES[machine]).speed > (1 - LOSS) * best


def speed_of_at_most(count: int, traces: list[Trace], machine: Machine) -> float:
    """Speed with at most ``count`` tokens of every proposal."""
    tokens, seconds = 0, 0.0
    for trace in traces:
        place = 1
        while place < len(trace.exit):
            _, length, right = trace.matches[place]
            drafts = min(count, length, len(trace.exit) - place - 1)
            emitted = min(right, drafts) + 1
            tokens, seconds, place = tokens + emitted, seconds + machine.passes(drafts + 1), place + emitted
    return tokens / seconds


def test_a_replay_repeats_itself():
    (traces, *_) = KINDS.values()
    one, other = (replay(traces, "auto", MACHINES["avx2"]) for _ in range(2))
    assert one == other
    assert one.tokens == sum(len(trace.exit) - 1 for trace in traces)


def test_a_trace_by_hand():
    """After 1 2 3, the text 1 2 3 4 2 3 5, of which the exit knows the odd tokens."""
    text = [1, 2, 3, 4, 2, 3, 5]
    trace = Trace.of("kind", [1, 2, 3], text, [token % 2 == 1 for token in text])
    found = [(0, 0, 0), (1, 2, 2), (2, 4, 1), (3, 12, 0), (0, 0, 0), (1, 2, 1), (2, 4, 0)]
    assert trace.matches == [Match(*one) for one in found]
    assert Trace.unpacked(trace.packed()) == trace


def test_a_machine_by_hand():
    machine = Machine({1: 1, 3: 2, 5: 2.5}, SMOLLM2, SMOLLM2.layer)
    assert [machine.passes(rows) for rows in (1, 2, 3, 4, 7)] == [1, 1.5, 2, 2.25, 3]
    whole = 30 * SMOLLM2.layer + SMOLLM2.head
    assert machine.seconds(Choice(None, 4)) == 2.5
    assert machine.seconds(Choice(2, 0)) == 1
    drafts = 2 * (2 * SMOLLM2.layer + SMOLLM2.draft_head)
    expected = (drafts + 3 * SMOLLM2.layer + 2 * (whole - 2 * SMOLLM2.layer)) / whole
    assert machine.seconds(Choice(2, 2)) == pytest.approx(expected)
    late = 2 * 2 * SMOLLM2.layer / whole + CATCH_UP
    assert machine.seconds(Choice(2, 2), 3) == pytest.approx(expected + late)


@requires_native
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("source", ["exit", "ngram", "auto"])
def test_a_replay_makes_the_choices_of_a_session(source, monkeypatch):
    """On a machine whose clock goes as the replay's; the model's exit has no draft layer."""
    machine = Machine({1: 1, 2: 1.1, 9: 2}, replace(SMOLLM2, num_draft_layers=0), 0, exit_layer=1)
    hf_model = tiny_model(upper="weak")
    decoder = SelfSpeculativeDecoder(hf_model, "auto", "auto", exit_choices=[1])
    prompt = torch.cat([prompt_of(9)] * 2, 1)
    text = decoder.generate(prompt, NEW, strategy="autoregressive", eos_token_id=[]).sequences
    (exit_, *_) = analyze_exits(hf_model, [(text[0], prompt.shape[1])]).agrees
    trace = Trace.of("tiny", prompt[0].tolist(), text[0, prompt.shape[1] :].tolist(), exit_.tolist())
    now, choices = [0.0], []

    def timed(batch, launch=Batch.launch):
        exit_layer = batch.kind.exit_layer if batch.draft_kind is DraftKind.EXIT else None
        choice = Choice(exit_layer, batch.num_speculations)
        choices.append(choice)
        launch(batch)
        now[0] += machine.seconds(choice)

    monkeypatch.setattr(Batch, "launch", timed)
    decoder._draft_model.controller = Controller(machine.sizes, [1])
    cache = decoder.model.decoder.new_cache(1, 160)
    session = Session(decoder.model, cache, decoder.defaults, decoder.controller, 140, 12, clock=lambda: now[0])
    session.add(prompt, NEW, draft_source=source, eos_token_id=[])
    while len(session):
        updates = session.step()
    assert torch.equal(updates[0].output.sequences, text)
    replayed = replay([trace], source, machine)
    drafted = [choice if choice.num_speculations else Choice(None, 0) for choice in choices]
    made = [choice if choice.num_speculations else Choice(None, 0) for choice in replayed.choices]
    assert made == drafted
    assert replayed.seconds == pytest.approx(now[0])
    assert len({choice.num_speculations for choice in choices}) > 2
    assert {choice.exit_layer for choice in drafted} >= ({1} if source == "exit" else {None})


def test_the_table(capsys):
    assert main(["--machine", "avx2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(KINDS)
    assert all("auto " in line and "×" in line for line in lines)
