"""Decoding with exits: the tokens are the stock model's, and every draft is the one that a slow exit makes.

The second is what finds holes in the draft layers' keys and values: after drafts that were accepted or not, after
prompts in whatever pieces, after drafts that were looked up.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from exits_of import SlowExit, copied_exit, random_exit
from helpers import tiny_tokenizer
from tiny import ARCHITECTURES, prompt_of, requires_native, tiny_model

from layerskip import Conversation, DraftHead, SelfSpeculativeDecoder
from layerskip.decoding import scheduler
from layerskip.decoding.adaptive import Choice, Controller
from layerskip.decoding.batch import Batch
from layerskip.decoding.scheduler import ChunkedPrefill
from layerskip.decoding.spec_step import NOT_DRAFTED
from layerskip.models import adapt

pytestmark = [pytest.mark.usefixtures("one_thread"), requires_native]
ROUNDING = 1e-4  # of logits, which are about 1
EXITS = {
    "random": lambda model: random_exit(model, 2, 2),
    "near": lambda model: copied_exit(model, 2, 1),
    "exact": lambda model: copied_exit(model, 1, 3),
}


class Watched:
    """Compares every draft of every round with that of the slow exit.

    Attributes
    ----------
    drafts, accepted, looked_up : int
        How many were compared, how many of them were accepted, and how many rounds looked their drafts up.
    """

    def __init__(self, monkeypatch, hf_model, exit_):
        self._slow = SlowExit(hf_model, exit_)
        self.drafts = self.accepted = self.looked_up = 0
        run = Batch.run

        def watched(batch):
            before = [one.all_tokens for one in batch.requests]
            looked_up = [one.lookup_drafts is not None for one in batch.requests]
            for one in batch.requests:  # what rejected drafts left there must not stand for what was never written
                for half in (batch._cache.k, batch._cache.v):
                    half[:, one.slot, :, one.position :] = torch.nan
            launched, results = run(batch)
            if batch.kind.speculative:
                for tokens, looks_up, result in zip(before, looked_up, results, strict=True):
                    self.looked_up += looks_up
                    if not looks_up:
                        self._compare(tokens, result)
            return launched, results

        monkeypatch.setattr(Batch, "run", watched)

    def _compare(self, tokens, result):
        accepted, _, *drafts = result
        made = drafts.index(NOT_DRAFTED) if NOT_DRAFTED in drafts else len(drafts)
        drafts = drafts[:made]
        if drafts:
            assert max(self._slow.margins(tokens, drafts)) < ROUNDING
        self.drafts, self.accepted = self.drafts + made, self.accepted + accepted


@pytest.fixture
def near(monkeypatch):
    """A model, a decoder of it with an exit that is right now and then, and what watches it."""
    hf_model = tiny_model("llama3", upper="weak")
    exit_ = EXITS["near"](adapt(hf_model))
    decoder = SelfSpeculativeDecoder(hf_model, num_speculations=4, exit=exit_)
    return hf_model, decoder, Watched(monkeypatch, hf_model, exit_)


def expected(hf_model, prompt, count):
    """The new tokens of the stock decoder without drafts."""
    return SelfSpeculativeDecoder(hf_model, 1).generate(prompt, count, strategy="autoregressive").new_tokens[0].tolist()


def finish(session):
    """The new tokens of a session's requests, by id."""
    tokens = {}
    while len(session):
        for update in session.step():
            assert update.error is None
            tokens.setdefault(update.request_id, []).extend(update.tokens)
    return tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", EXITS)
def test_one_prompt(monkeypatch, architecture, kind):
    hf_model = tiny_model(architecture, upper="weak")
    exit_ = EXITS[kind](adapt(hf_model))
    watched = Watched(monkeypatch, hf_model, exit_)
    out = SelfSpeculativeDecoder(hf_model, num_speculations=4, exit=exit_).generate(prompt_of(5), 60)
    assert out.new_tokens[0].tolist() == expected(hf_model, prompt_of(5), 60)
    assert watched.drafts > 40
    if kind == "exact":
        assert watched.accepted == watched.drafts
    elif kind == "near":
        assert 0.1 < watched.accepted / watched.drafts < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXITS)
@pytest.mark.parametrize("head", [None, "int8"])
def test_tokens_are_those_of_the_stock_model(dtype, kind, head):
    hf_model = tiny_model("qwen2", dtype, "weak")
    decoder = SelfSpeculativeDecoder(hf_model, exit=EXITS[kind](adapt(hf_model)), draft_head=head)
    prompts = [prompt_of(length, length)[0] for length in (1, 7, 80)]
    out = decoder.generate(prompts, 50)
    stock = SelfSpeculativeDecoder(hf_model, 2).generate(prompts, 50, strategy="autoregressive")
    assert torch.equal(out.new_tokens, stock.new_tokens)
    assert out.stats.drafted > 100


def test_a_reduced_head_with_a_correction():
    hf_model = tiny_model(upper="weak")
    model = adapt(hf_model)
    exit_ = random_exit(model, 2, 1, token_ids=list(range(0, 101, 2)), rank=4)
    decoder = SelfSpeculativeDecoder(hf_model, exit=exit_)
    assert decoder.draft_head.token_map.numel() == 51
    out = decoder.generate(prompt_of(5), 60)
    assert out.new_tokens[0].tolist() == expected(hf_model, prompt_of(5), 60)


@pytest.mark.parametrize("per_step", [None, 1, 7, "auto"])
def test_prompts_in_pieces_and_several_in_one_pass(near, per_step):
    hf_model, decoder, watched = near
    session = decoder.open_session(3, prompt_tokens_per_step=per_step)
    prompts = [prompt_of(length, length) for length in (2, 150, 9, 3, 70)]
    ids = [session.add(prompt, 20) for prompt in prompts]
    tokens = finish(session)
    assert [tokens[one] for one in ids] == [expected(hf_model, prompt, 20) for prompt in prompts]
    assert watched.accepted > 10


def test_prompts_read_by_torch_matmuls(near, monkeypatch):
    hf_model, decoder, watched = near
    monkeypatch.setattr(ChunkedPrefill, "fused", False)
    monkeypatch.setattr("layerskip.decoding.scheduler.TORCH_ROWS", 16)
    out = decoder.generate([prompt_of(length, length)[0] for length in (40, 5)], 20)
    plain = SelfSpeculativeDecoder(hf_model, 1).generate(
        [prompt_of(length, length)[0] for length in (40, 5)], 20, strategy="autoregressive"
    )
    assert torch.equal(out.new_tokens, plain.new_tokens)
    assert watched.drafts > 20


def test_a_prefix_in_another_slot_is_reused(near):
    hf_model, decoder, watched = near
    session = decoder.open_session(2)
    prompt = torch.cat([prompt_of(40)[:, :30], prompt_of(5, 1)], 1)
    session.add(prompt_of(40), 30)
    (begun,) = session.step()
    second = session.add(prompt, 30)
    tokens, reused = {begun.request_id: begun.tokens}, {}
    while len(session):
        for update in session.step():
            tokens.setdefault(update.request_id, []).extend(update.tokens)
            if update.output is not None:
                reused[update.request_id] = update.output.stats.reused
    assert tokens[begun.request_id] == expected(hf_model, prompt_of(40), 30)
    assert tokens[second] == expected(hf_model, prompt, 30)
    assert reused == {begun.request_id: 0, second: 30}
    assert watched.accepted > 5


@pytest.mark.parametrize(("strategy", "reused"), [("self_speculative", 29), ("autoregressive", 0), ("early_exit", 0)])
def test_continuing_a_request_of_each_strategy(near, strategy, reused):
    """A row whose draft layers have not read everything is read again before an exit drafts on it."""
    hf_model, decoder, watched = near
    session = decoder.open_session(1)
    first = session.add(prompt_of(10), 20, strategy=strategy, keep=True)
    tokens = finish(session)[first]
    second = session.add(prompt_of(3, 1), 30, continue_from=first)
    outputs = {}
    while len(session):
        outputs |= {update.request_id: update.output for update in session.step() if update.output is not None}
    whole = torch.cat([prompt_of(10), torch.tensor([tokens]), prompt_of(3, 1)], 1)
    assert outputs[second].new_tokens[0].tolist() == expected(hf_model, whole, 30)
    assert outputs[second].stats.reused == reused
    assert watched.drafts > 20


def test_a_slot_survives_an_interrupt_while_draft_layers_catch_up(near, monkeypatch):
    """What continues a kept request takes its slot only when the exit's draft layers have read what that holds."""
    hf_model, decoder, _ = near
    session = decoder.open_session(1)
    with monkeypatch.context() as looking_up:
        looking_up.setattr(Controller, "choose_with_lookups", lambda *args, **named: (Choice(None, 0), [0]))
        first = session.add(prompt_of(10), 20, draft_source="auto", keep=True)
        tokens = finish(session)[first]
    interrupts, catch_up = [KeyboardInterrupt], scheduler.catch_up_draft_layers

    def interrupted(*args):
        if interrupts:
            raise interrupts.pop()
        return catch_up(*args)

    monkeypatch.setattr(scheduler, "catch_up_draft_layers", interrupted)
    second = session.add(prompt_of(3, 1), 8, continue_from=first)
    with pytest.raises(KeyboardInterrupt):
        finish(session)
    assert session.kept == (first,)
    whole = torch.cat([prompt_of(10), torch.tensor([tokens]), prompt_of(3, 1)], 1)
    assert finish(session)[second] == expected(hf_model, whole, 8)


def test_a_draft_that_ends_at_once_still_runs_draft_layers(near, monkeypatch):
    """Nothing is drafted, yet its draft layers have run: there is nothing to catch up."""
    hf_model, decoder, _ = near
    reads = []
    monkeypatch.setattr("layerskip.decoding.batch.catch_up_draft_layers", lambda *args: reads.append(args))
    session = decoder.open_session(1)
    session.add(prompt_of(5), 20, draft_threshold=1.0)
    while len(session):
        updates = session.step()
        assert all(request.draft_lag == 0 for request in session._scheduler.running)
    assert (updates[0].output.stats.drafted, reads) == (0, [])
    assert updates[0].output.new_tokens[0].tolist() == expected(hf_model, prompt_of(5), 20)


@pytest.mark.parametrize("continued", ["itself", "in another slot"])
def test_continuing_after_lookup_rounds(near, monkeypatch, continued):
    """The draft layers have read none of it: they do before an exit drafts, in whichever row."""
    hf_model, decoder, watched = near
    with monkeypatch.context() as looking_up:
        looking_up.setattr(Controller, "choose_with_lookups", lambda *args, **named: (Choice(None, 0), [0]))
        session = decoder.open_session(2)
        first = session.add(prompt_of(10), 20, draft_source="auto", keep=True)
        tokens = finish(session)[first]
    whole = torch.cat([prompt_of(10), torch.tensor([tokens]), prompt_of(3, 1)], 1)
    itself = continued == "itself"
    second = session.add(prompt_of(3, 1) if itself else whole, 30, continue_from=first if itself else None)
    outputs = {}
    while len(session):
        outputs |= {update.request_id: update.output for update in session.step() if update.output is not None}
    assert outputs[second].new_tokens[0].tolist() == expected(hf_model, whole, 30)
    assert outputs[second].stats.reused == 29
    assert watched.drafts > 20


def test_strategies_side_by_side(near):
    hf_model, decoder, watched = near
    session = decoder.open_session(4, prompt_tokens_per_step=3)
    strategies = ["self_speculative", "autoregressive", "early_exit", "self_speculative"]
    ids = [session.add(prompt_of(10, seed), 25, strategy=one) for seed, one in enumerate(strategies)]
    tokens = finish(session)
    shallow = SelfSpeculativeDecoder(hf_model, 2)
    for seed, (one, strategy) in enumerate(zip(ids, strategies, strict=True)):
        plain = "early_exit" if strategy == "early_exit" else "autoregressive"
        assert tokens[one] == shallow.generate(prompt_of(10, seed), 25, strategy=plain).new_tokens[0].tolist()
    assert watched.drafts > 40


def test_drafts_that_end_early(near):
    hf_model, decoder, watched = near
    out = decoder.generate(prompt_of(5), 60, draft_threshold=0.05, num_speculations=6)
    assert out.new_tokens[0].tolist() == expected(hf_model, prompt_of(5), 60)
    rounds = out.stats.rounds
    assert 0 < watched.drafts < 6 * rounds, "some end early"
    assert watched.accepted > 0


def test_num_speculations_auto(near):
    """Among others, none."""
    hf_model, decoder, watched = near
    out = decoder.generate(prompt_of(5), 60, num_speculations="auto")
    assert out.new_tokens[0].tolist() == expected(hf_model, prompt_of(5), 60)
    assert watched.drafts >= out.stats.drafted


def test_processed_logits(near):
    hf_model, decoder, watched = near
    out = decoder.generate(prompt_of(5), 60, logits_processor=lambda history, logits: logits)
    assert out.new_tokens[0].tolist() == expected(hf_model, prompt_of(5), 60)
    assert watched.drafts > 60
    assert watched.accepted > 5


@pytest.mark.parametrize("processed", [False, True])
def test_alternating_lookup_and_exit_drafts(near, monkeypatch, processed):
    """By turns: all rows look up, none does, the first one does."""
    hf_model, decoder, watched = near
    turns = itertools.count()

    def plan(controller, acceptances, proposals, exit_layer=None, num_speculations=None, exits=True):
        drafts = Choice(2, 3)
        counts = [len(proposal.tokens) for proposal in proposals]
        if not exits:
            return Choice(None, max(counts)), counts
        turn = next(turns) % 3
        if turn == 0:
            return Choice(None, max(counts)), counts
        return drafts, [None] * len(counts) if turn == 1 else [counts[0], *[None] * (len(counts) - 1)]

    monkeypatch.setattr(Controller, "choose_with_lookups", plan)
    processor = (lambda history, logits: logits) if processed else None
    session = decoder.open_session(3)
    sources = ["auto", "auto", "ngram"]
    prompts = [torch.cat([prompt_of(6, seed)] * 4, 1) for seed in range(3)]
    ids = [
        session.add(prompt, 50, draft_source=source, logits_processor=processor)
        for prompt, source in zip(prompts, sources, strict=True)
    ]
    tokens = finish(session)
    assert [tokens[one] for one in ids] == [expected(hf_model, prompt, 50) for prompt in prompts]
    assert watched.drafts > 10
    assert watched.looked_up > 10


def test_catching_up_is_predicted_and_not_learned(near, monkeypatch):
    """By turns: drafts are looked up, the exit makes them after its draft layers have read, and once more at once."""
    _, decoder, _ = near
    behind, learned = [], []

    def plan(controller, acceptances, proposals, *given, **named):
        behind.append(acceptances[0].lag)
        return (Choice(2, 3), [None]) if len(behind) % 3 != 1 else (Choice(None, 0), [0])

    monkeypatch.setattr(Controller, "choose_with_lookups", plan)
    monkeypatch.setattr(Controller, "observe_cost", lambda controller, choice, *cost: learned.append(choice))
    session = decoder.open_session(1)
    session.add(prompt_of(10), 60, draft_source="auto")
    while len(behind) < 9:
        session.step()
    assert behind == [0, 1, 0] * 3
    assert learned == [Choice(None, 0), Choice(2, 3)] * 3, "none of the rounds before which the draft layers read"


def test_an_interrupt_keeps_draft_layers_right(near, monkeypatch):
    """Whatever a step had done when it was interrupted, the drafts after it are right."""
    hf_model, decoder, watched = near
    session = decoder.open_session(2)
    calls = []

    def stops(tokens):
        calls.append(len(tokens))
        if len(calls) in (9, 20, 33):
            raise KeyboardInterrupt
        return False

    ids = [session.add(prompt_of(5, seed), 40, should_stop=stops) for seed in range(2)]
    tokens = {one: [] for one in ids}
    interrupts = 0
    while len(session):
        try:
            updates = session.step()
        except KeyboardInterrupt:
            interrupts += 1
            continue
        for update in updates:
            tokens[update.request_id] += update.tokens
    assert interrupts == 3
    assert [tokens[one] for one in ids] == [expected(hf_model, prompt_of(5, seed), 40) for seed in range(2)]
    assert watched.accepted > 5


def test_a_stream_and_a_conversation(near):
    hf_model, decoder, watched = near
    tokenizer = tiny_tokenizer("w{:03}")
    text = "".join(decoder.stream(prompt_of(5), 40, tokenizer=tokenizer))
    stock = SelfSpeculativeDecoder(hf_model, 1)
    assert text == "".join(stock.stream(prompt_of(5), 40, tokenizer=tokenizer, strategy="autoregressive"))
    conversation, whole = Conversation(decoder), torch.empty(1, 0, dtype=torch.int64)
    for turn in range(3):
        whole = torch.cat([whole, prompt_of(6, turn)], 1)
        out = conversation.generate(prompt_of(6, turn), 15)
        whole = torch.cat([whole, torch.tensor([expected(hf_model, whole, 15)])], 1)
        assert torch.equal(out.sequences, whole)
    assert watched.accepted > 10


def test_several_threads_at_once(near):
    hf_model, decoder, _ = near
    prompts = [prompt_of(5 + seed, seed) for seed in range(6)]
    wanted = [expected(hf_model, prompt, 20) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda prompt: decoder.generate(prompt, 20), prompts))
    assert [out.new_tokens[0].tolist() for out in outputs] == wanted


def test_invalid_combinations():
    model = tiny_model()
    exit_ = random_exit(adapt(model))
    with pytest.raises(ValueError, match="exit_layer is 3, but the exit that is given is after 2 layers"):
        SelfSpeculativeDecoder(model, 3, exit=exit_)
    with pytest.raises(ValueError, match=r"exit_choices is \[1\], but the exit that is given is after 2 layers"):
        SelfSpeculativeDecoder(model, exit=exit_, exit_choices=[1])
    with pytest.raises(ValueError, match="draft_head must be 'full', 'int8' or a DraftHead, got 'int4'"):
        SelfSpeculativeDecoder(model, exit=exit_, draft_head="int4")
    with pytest.raises(ValueError, match="the draft head is for a vocabulary of 64, the model has 101"):
        SelfSpeculativeDecoder(model, exit=exit_, draft_head=DraftHead([1], 64))
    with pytest.raises(FileNotFoundError, match=r"no exit at nowhere/exit\.safetensors"):
        SelfSpeculativeDecoder(model, exit="nowhere")
    decoder = SelfSpeculativeDecoder(model, "auto", exit=exit_)
    assert decoder.exit_layer == 2
    with pytest.raises(ValueError, match="exit_layer is 1, but the exit that is given is after 2 layers"):
        decoder.generate(prompt_of(3), 5, exit_layer=1)
    assert decoder.generate(prompt_of(3), 5, exit_layer=1, strategy="early_exit").stats.new_tokens == 5
    assert decoder.generate(prompt_of(3), 5, exit_layer="auto").stats.new_tokens == 5
    bound = decoder.model
    for call in (bound.draft, bound.speculate):
        with pytest.raises(ValueError, match="exit_layer is 1, but the model's exit is after 2 layers"):
            call(torch.tensor([3]), bound.decoder.new_cache(1, 8), 1, 2)
    with pytest.raises(ValueError, match="has an exit with draft layers already"):
        bound.with_exit(exit_.of(bound))


def test_another_head_for_the_same_exit():
    model = tiny_model()
    exit_ = random_exit(adapt(model), token_ids=[3, 5, 70])
    assert SelfSpeculativeDecoder(model, exit=exit_).draft_head.num_rows == 3
    assert SelfSpeculativeDecoder(model, exit=exit_, draft_head="full").draft_head.num_rows == 101
    other = SelfSpeculativeDecoder(model, exit=exit_, draft_head=DraftHead([1, 2], 101)).draft_head
    assert other.token_map.tolist() == [1, 2]
    assert torch.equal(other.norm_weight, exit_.norm_weight)
