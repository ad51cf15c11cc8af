"""The record of a decoding's rounds: every token is in it once, with what really drafted it, whatever drafts."""

from __future__ import annotations

import pytest
import torch
from tiny import prompt_of, requires_native, tiny_model

from layerskip import NgramSource, SamplingParams
from layerskip.decoding import DraftSource, SelfSpeculativeDecoder

pytestmark = [pytest.mark.usefixtures("one_thread"), requires_native]
NEW = 40


class Sevens(DraftSource):
    """Proposes the token 7, again and again."""

    def propose(self, history):
        return [7] * 3


@pytest.fixture(scope="module")
def decoder():
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), 2, 4)


WAYS = {
    "exit": {},
    "threshold": {"draft_threshold": 0.2},
    "n-grams": {"draft_source": "ngram"},
    "auto": {"draft_source": "auto", "exit_layer": "auto", "num_speculations": "auto"},
    "own": {"draft_source": Sevens()},
    "autoregressive": {"strategy": "autoregressive"},
    "early exit": {"strategy": "early_exit"},
    "drawn": {"sampling": SamplingParams(0.8, seed=5)},
}


def replayed(first, stats, tokens):
    """The tokens and flags of which the records tell; the full model's own ones are taken from ``tokens``."""
    told, flags = [first], [False]
    for record in stats.records:
        assert len(told) + len(record.drafts) <= NEW, "drafts that could not be emitted are none"
        assert not record.drafts or (record.exit_layer is None) == (record.source != "exit")
        told += record.drafts[: record.accepted]
        flags += [True] * record.accepted
        assert record.emitted - record.accepted in (0, 1)
        if record.emitted > record.accepted:
            told.append(tokens[len(told)])
            flags.append(False)
    return told, flags


def check(out):
    """That the records of every sequence are those of its tokens, and that the counts are those of the tokens."""
    for row, stats in enumerate(out.per_sequence):
        tokens, drafted = out.new_tokens[row].tolist(), out.drafted[row].tolist()
        told, flags = replayed(tokens[0], stats, tokens)
        assert told == tokens[: stats.new_tokens]
        assert flags == drafted[: stats.new_tokens]
        assert stats.accepted == sum(flags) == sum(count.accepted for count in stats.by_source.values())
        assert stats.rounds >= flags.count(False) - 1
        assert sum(record.emitted for record in stats.records) == stats.new_tokens - 1


@pytest.mark.parametrize("way", WAYS)
def test_every_token_is_in_one_record(decoder, way):
    out = decoder.generate(prompt_of(9), NEW, eos_token_id=[], **WAYS[way])
    check(out)
    if way not in ("early exit", "drawn"):
        plain = decoder.generate(prompt_of(9), NEW, eos_token_id=[], strategy="autoregressive")
        assert out.new_tokens.equal(plain.new_tokens)


@pytest.mark.parametrize("way", WAYS)
def test_records_in_batches(decoder, way):
    prompts = [prompt_of(length, length)[0] for length in (9, 5, 17)]
    out = decoder.generate(prompts, NEW, eos_token_id=int(prompts[0][0]), **WAYS[way])
    check(out)
    assert out.stats.records == tuple(record for stats in out.per_sequence for record in stats.records)
    assert out.stats.drafted == sum(stats.drafted for stats in out.per_sequence)


@pytest.mark.parametrize("way", ["exit", "n-grams", "own"])
def test_the_drafts_are_those_of_the_source(decoder, way):
    """What each record says was drafted is what its source says after the tokens before it."""
    out = decoder.generate(prompt_of(9), NEW, eos_token_id=[], **WAYS[way])
    before, place = out.sequences[0].tolist(), 10
    for record in out.stats.records:
        asked = before[:place]
        assert record.source == {"exit": "exit", "n-grams": "ngram", "own": "Sevens"}[way]
        assert record.exit_layer == (2 if way == "exit" else None)
        assert list(record.drafts) == expected(decoder, way, asked, len(record.drafts))
        if record.emitted > record.accepted < len(record.drafts):
            assert record.drafts[record.accepted] != before[place + record.accepted], "a rejected draft was right"
        place += record.emitted
    assert place == len(before)
    assert 0 < out.stats.accepted < out.stats.drafted or way == "own"


def expected(decoder, way, tokens, count):
    if way == "own":
        return [7] * count
    if way == "n-grams":
        return list(NgramSource().propose(tokens))[:count]
    if count == 0:
        return []
    asked = decoder.generate(torch.tensor([tokens]), count, eos_token_id=[], strategy="early_exit", exit_layer=2)
    return asked.new_tokens[0].tolist()


def test_records_without_speculation(decoder):
    for strategy, source, layer in (("autoregressive", "none", None), ("early_exit", "exit", 2)):
        records = decoder.generate(prompt_of(9), NEW, eos_token_id=[], strategy=strategy).stats.records
        assert records == ((source, layer, (), 0, 1),) * (NEW - 1)


def test_a_sequence_that_ends_within_its_drafts():
    decoder = SelfSpeculativeDecoder(tiny_model(upper="silent"), 1, 4)  # every draft is accepted
    text = decoder.generate(prompt_of(9), NEW, eos_token_id=[])
    assert {(record.accepted, record.emitted) for record in text.stats.records[:-1]} == {(4, 5)}
    end = 7  # the third token of the second round
    out = decoder.generate(prompt_of(9), NEW, should_stop=lambda tokens: len(tokens) == end)
    check(out)
    last = out.stats.records[-1]
    assert last.decided == 1, "of the others nobody knows"
    assert (len(last.drafts), last.accepted, last.emitted, last.decided) == (4, 1, 1, 1)


def run(session):
    while len(session):
        session.step()


def test_the_record_of_an_interrupted_round(decoder):
    """It emitted some of its drafts; the record counts those."""
    decoder = SelfSpeculativeDecoder(tiny_model(upper="silent"), 1, 4)

    def interrupt(tokens):
        if len(tokens) == 8:
            raise KeyboardInterrupt
        return False

    session = decoder.open_session(1, max_seq_len=64)
    request = session.add(prompt_of(9), 30, should_stop=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(session)
    session.cancel(request)
    out = session.step()[0].output
    check(out)
    assert out.new_tokens.shape[1] == 7
    assert out.stats.records[-1][2:] == (out.stats.records[-1].drafts, 1, 1)
