"""Sampled tokens have exactly transformers' distribution, and a seed repeats them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import helpers
import pytest
import torch
import transformers
from exits_of import random_exit
from tiny import VOCABULARY, native_missing, prompt_of, requires_native, tiny_model

from layerskip import DraftHead, SamplingParams, SelfSpeculativeDecoder
from layerskip.decoding import spec_step as logits_module
from layerskip.decoding.sampling import History, LogitsControls, LogitsPipeline
from layerskip.decoding.spec_step import NOT_DRAFTED, LookupDrafts, SequenceTensors, SpecStep
from layerskip.models import adapt

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class TestParams:
    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            ({"temperature": -0.1}, ValueError, r"temperature must be in \[0, 1e\+06\], got -0.1"),
            ({"temperature": math.inf}, ValueError, r"temperature must be in \[0, 1e\+06\], got inf"),
            ({"temperature": math.nan}, ValueError, r"temperature must be in \[0, 1e\+06\], got nan"),
            ({"temperature": False}, TypeError, "temperature must be a number, got False"),
            ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
            ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
            ({"top_k": 2.0}, TypeError, "top_k must be an int, got 2.0"),
            ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
            ({"top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\], got 1.1"),
            ({"min_p": -0.2}, ValueError, r"min_p must be in \[0, 1\], got -0.2"),
            ({"min_p": True}, TypeError, "min_p must be a number, got True"),
            ({"repetition_penalty": 0.0}, ValueError, r"repetition_penalty must be in \[1e-06, 1e\+06\], got 0.0"),
            ({"seed": -1}, ValueError, "seed must be in 0 … 9223372036854775807, got -1"),
            ({"seed": 2**63}, ValueError, "seed must be in 0 … 9223372036854775807, got 9223372036854775808"),
            ({"seed": 1.0}, TypeError, "seed must be an int, got 1.0"),
            ({"logit_bias": {-1: 0.0}}, ValueError, "logit_bias must be at least 0, got -1"),
            ({"logit_bias": {4: math.inf}}, ValueError, r"logit_bias\[4\] must be in \[-1e\+06, 1e\+06\], got inf"),
            ({"logit_bias": {4: math.nan}}, ValueError, r"logit_bias\[4\] must be in .* got nan"),
        ],
    )
    def test_out_of_range(self, values, error, message):
        with pytest.raises(error, match=message):
            SamplingParams(**values)

    def test_what_needs_processing(self):
        assert not SamplingParams().processes
        assert not SamplingParams(temperature=0.7, seed=3).processes
        assert not SamplingParams(top_k=3, top_p=0.5).processes, "the largest survives any cut"
        for values in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
            assert SamplingParams(temperature=1.0, **values).processes
        assert SamplingParams(logit_bias={3: 1.0}).processes


PARAMS = [
    SamplingParams(0.7),
    SamplingParams(1.3, top_k=5),
    SamplingParams(0.9, top_p=0.6),
    SamplingParams(1.0, min_p=0.1),
    SamplingParams(1.0, repetition_penalty=1.4),
    SamplingParams(0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=0.8, logit_bias={3: 4.0, 9: -math.inf}),
    SamplingParams(1.0, top_k=500, top_p=1e-6),
    SamplingParams(1.0, top_k=5, top_p=0.9),
    SamplingParams(0.0, repetition_penalty=1.3, logit_bias={5: 2.0}, top_k=1),
]


def warpers(params: SamplingParams) -> transformers.LogitsProcessorList:
    """What transformers builds for the same parameters."""
    made = transformers.LogitsProcessorList()
    if params.logit_bias:
        made.append(
            transformers.SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()})
        )
    if params.repetition_penalty != 1:
        made.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.greedy:
        return made
    made.append(transformers.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        made.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        made.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        made.append(transformers.MinPLogitsWarper(params.min_p))
    return made


def processed(params, own, logits, histories) -> tuple[torch.Tensor, dict[int, Exception]]:
    """Logits after these tokens, and the failures of the sequences' own processors."""
    pipeline = LogitsPipeline(own, [History(history[None], 0) for history in histories])
    controls = LogitsControls.of(params, histories, logits.shape[1], CPU)
    return pipeline(logits, controls, 0, range(len(logits))), pipeline.failures


class TestLogitsPipeline:
    def logits(self, rows: int) -> torch.Tensor:
        return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
    def test_they_do_what_transformers_do(self, params):
        logits, histories = self.logits(9), [prompt_of(12, seed)[0] for seed in range(9)]
        ours, _ = processed([params] * 9, [None] * 9, logits, histories)
        theirs = warpers(params)(torch.stack(histories), logits.clone())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    def test_top_p_is_a_share_of_what_top_k_leaves(self):
        """Of 0.4, 0.3, 0.2, 0.1 the two largest are 4/7 and 3/7; 4/7 is more than 0.55, while 0.4 is not."""
        logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
        kept, _ = processed([SamplingParams(1.0, top_k=2, top_p=0.55)], [None], logits, [torch.tensor([0])])
        assert kept.isfinite().tolist() == [[False, True, False, False]]

    def test_the_bound_of_min_p_is_kept(self):
        """A quarter of the largest probability, exactly."""
        logits = torch.tensor([[0.0, math.log(0.25), math.log(0.2499), -5.0]])
        logits[0, 1] = torch.tensor(0.25).log()
        kept, _ = processed([SamplingParams(1.0, min_p=0.25)], [None], logits, [torch.tensor([0])])
        assert kept.isfinite().tolist() == [[True, True, False, False]]
        assert torch.equal(kept, warpers(SamplingParams(1.0, min_p=0.25))(torch.zeros(1, 1).long(), logits))

    def test_the_bound_of_top_p_is_enough(self):
        """Of four equal probabilities two reach a half, exactly."""
        kept, _ = processed([SamplingParams(1.0, top_p=0.5)], [None], torch.zeros(1, 4), [torch.tensor([0])])
        assert kept.isfinite().sum() == 2

    def test_each_sequence_has_its_own(self):
        logits, histories = self.logits(len(PARAMS)), [prompt_of(12, seed)[0] for seed in range(len(PARAMS))]
        together, _ = processed(PARAMS, [None] * len(PARAMS), logits, histories)
        for row, params in enumerate(PARAMS):
            alone, _ = processed([params], [None], logits[row : row + 1], histories[row : row + 1])
            assert torch.equal(together[row], alone[0])

    def test_own_processors_run_between_penalty_and_temperature(self):
        params, logits = SamplingParams(0.5, repetition_penalty=2.0), self.logits(1)
        history = torch.tensor([int(logits.argmax())])
        seen = []
        out, _ = processed([params], [lambda *args: seen.append(args) or args[1] + 1], logits, [history])
        assert torch.equal(seen[0][0], history)
        assert seen[0][1].max() < logits.max()
        assert torch.equal(out[0], (seen[0][1] + 1) / 0.5)

    def test_a_failure_is_kept_for_its_sequence(self):
        def broken(history, logits):
            raise RuntimeError("broken")

        own, logits = [None, broken, lambda h, x: x[:3]], self.logits(3)
        out, failures = processed([SamplingParams()] * 3, own, logits, [torch.tensor([1])] * 3)
        assert torch.equal(out, logits)
        assert str(failures[1]) == "broken"
        assert str(failures[2]) == "a logits processor must give a tensor [101], got [3]"


def many(test):
    """A test of very many samples."""
    skip = pytest.mark.skipif(native_missing() is not None, reason="takes minutes on the torch reference")
    return pytest.mark.slow(pytest.mark.time_limit(7200)(skip(test)))


SMALL = 6
DEPTH = 3
EXIT, DRAFTS = 1, 2
SAMPLES, BATCH = 100_000, 10_000


@pytest.fixture(scope="module")
def small():
    """A model of 6 tokens, whose first layer is right often, but not always."""
    model = helpers.tiny_model("llama2", vocab_size=SMALL, tie_word_embeddings=False)
    for layer in model.model.layers[1:]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= 0.4
    return model


PROMPT = torch.tensor([[2, 5, 1, 1]])


@torch.no_grad()
def exact(model, params: SamplingParams) -> torch.Tensor:
    """Probability of each continuation of three tokens [6, 6, 6], by transformers alone."""
    joint = torch.ones(())
    for length in range(DEPTH):
        prefixes = torch.tensor(list(itertools.product(range(SMALL), repeat=length)), dtype=torch.int64)
        ids = torch.cat([PROMPT.expand(SMALL**length, -1), prefixes.view(SMALL**length, length)], 1)
        scores = warpers(params)(ids, model(ids).logits[:, -1].float())
        joint = joint.reshape(-1, 1) * scores.softmax(-1)
    return joint.flatten()


def guesses(token: torch.Tensor) -> LookupDrafts:
    """Drafts that need no model: after every token the same two; after one of the six, only one."""
    return LookupDrafts.of([[(last + 1) % SMALL, 2][: 1 + (last != 3)] for last in token.tolist()], 2, SMALL, CPU, True)


def sample(decoder: SelfSpeculativeDecoder, params: SamplingParams, first_seed: int, looks_up: bool) -> torch.Tensor:
    """Continuations [BATCH, 3] of the prompt, all drawn in the same rounds, each from a seed of its own."""
    model, length = decoder.model, PROMPT.shape[1]
    cache = model.decoder.new_cache(BATCH, length + DEPTH + DRAFTS + 1)
    seq_lens, slots = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    hidden = model.read(PROMPT, cache, draft_layers=True, seq_lens=seq_lens, slots=slots)[:, -1].expand(BATCH, -1)
    for half in (cache.k, cache.v):
        half[:, 1:] = half[:, :1]
    lengths, seeds = torch.full((BATCH,), length - 1), torch.arange(first_seed, first_seed + BATCH)
    temperatures = torch.full((BATCH,), params.temperature)
    sequences = SequenceTensors(torch.zeros_like(seeds), lengths, torch.arange(BATCH), seeds, temperatures)
    step = SpecStep(model, cache)
    if params.processes:
        controls = LogitsControls.of([params] * BATCH, [PROMPT[0]] * BATCH, SMALL, CPU)
        sequences = replace(sequences, controls=controls)
        step = SpecStep(model, cache, LogitsPipeline(), may_sync=True)
    sequences.token.copy_(step.first(hidden, sequences))
    lengths += 1
    drawn = torch.full((BATCH, DEPTH + DRAFTS), -1)
    drawn[:, 0], counts = sequences.token, torch.ones_like(seeds)
    while int(counts.min()) < DEPTH:
        if looks_up:
            packed = step.speculate(replace(sequences, lookup=guesses(sequences.token)), EXIT, DRAFTS)
        else:
            packed = step.speculate(sequences, EXIT, DRAFTS)
        accepted, token, drafts = packed[:, 0], packed[:, 1], packed[:, 2:]
        for index in range(DRAFTS + 1):
            value = token if index == DRAFTS else torch.where(accepted > index, drafts[:, index], token)
            going = (index <= accepted) & (counts < DEPTH)
            drawn[going, counts[going]] = value[going]
            counts += going.long()
        # Sequences that are through go on drawing, at positions that stay where they are.
        through = counts >= DEPTH
        sequences.seq_lens[through] = length
    return drawn[:, :DEPTH]


def chi_square_excess(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean (Wilson and Hilferty 1931)."""
    codes = (drawn * SMALL ** torch.arange(DEPTH - 1, -1, -1)).sum(1)
    observed = codes.bincount(minlength=SMALL**DEPTH).double()
    expected = probabilities.double() * drawn.shape[0]
    assert observed[expected == 0].sum() == 0, "something was drawn that has no probability"
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    statistic = float(((observed - expected).square() / expected)[kept].sum())
    freedom = int(kept.sum()) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


def excess(model, params: SamplingParams, head: str = "full", looks_up: bool = False) -> float:
    exit_ = random_exit(adapt(model), EXIT) if head == "exit" else None
    decoder = SelfSpeculativeDecoder(model, EXIT, DRAFTS, draft_head=HEADS.get(head), exit=exit_)
    with torch.inference_mode():
        drawn = torch.cat([sample(decoder, params, first, looks_up) for first in range(0, SAMPLES, BATCH)])
    return chi_square_excess(drawn, exact(model, params))


LIMIT = 3.0
"""Standard deviations; a right sampler is above it once in 700 times, and the seeds are fixed."""
HEADS = {"full": "full", "reduced": DraftHead([0, 2, 3], SMALL)}
NOT_FULL = ("reduced", "exit")
DRAWN = {
    "temperature": SamplingParams(1.2),
    "top-k": SamplingParams(1.5, top_k=3),
    "top-p": SamplingParams(1.2, top_p=0.8),
    "min-p and bias": SamplingParams(1.5, min_p=0.05, logit_bias={1: 1.0, 4: -math.inf}),
}


@many
@pytest.mark.parametrize(
    ("params", "head"),
    [*((name, "full") for name in DRAWN), *((name, head) for name in ("temperature", "top-p") for head in NOT_FULL)],
)
def test_100k_continuations_have_the_models_distribution(small, params, head):
    assert excess(small, DRAWN[params], head) < LIMIT


@many
@pytest.mark.parametrize("params", DRAWN)
def test_100k_continuations_with_lookup_drafts_have_it_too(small, params):
    assert excess(small, DRAWN[params], looks_up=True) < LIMIT


@many
@pytest.mark.parametrize("params", ["temperature", "top-k"])
def test_a_wrong_distribution_of_lookup_drafts_is_detected(small, params, monkeypatch):
    monkeypatch.setattr(
        LookupDrafts, "logits", property(lambda one: torch.zeros(*one.tokens.shape, len(one.token_map)))
    )
    assert excess(small, DRAWN[params], looks_up=True) > 3 * LIMIT


@many
def test_a_wrong_acceptance_rule_is_detected(small, monkeypatch):
    """It takes every draft for one that had all tokens equally probable."""
    accept = logits_module.accept_sampled
    monkeypatch.setattr(
        logits_module, "accept_sampled", lambda draft, logits, *rest: accept(draft, torch.zeros_like(logits), *rest)
    )
    assert excess(small, DRAWN["top-k"]) > 3 * LIMIT


@many
def test_reused_noise_is_detected(small, monkeypatch):
    """A rejected draft and what replaces it must not be drawn with the same noise."""
    monkeypatch.setattr(logits_module, "_DRAFT_SEED", 0)
    assert excess(small, DRAWN["top-k"]) > 3 * LIMIT


@pytest.fixture(scope="module")
def decoder():
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 3)


SAMPLERS = [*PARAMS, SamplingParams(1.1)]


def drawn_with(decoder, params, generator=None, **options):
    out = decoder.generate([prompt_of(5)[0], prompt_of(8)[0]], 20, sampling=params, generator=generator, **options)
    return out.new_tokens.tolist()


@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive", "early_exit"])
@pytest.mark.parametrize("params", SAMPLERS, ids=range(len(SAMPLERS)))
def test_a_seed_repeats_the_tokens(decoder, params, strategy):
    runs = [drawn_with(decoder, params, torch.Generator().manual_seed(seed), strategy=strategy) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert (runs[0] == runs[2]) == params.greedy or params.top_p < 0.1


def test_torchs_generator_is_the_default(decoder):
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        runs.append(drawn_with(decoder, SamplingParams(1.0)))
    assert runs[0] == runs[1] != runs[2]


def test_a_shared_seed_is_incremented(decoder):
    """Equal prompts go on differently, each as it would alone."""
    prompt = prompt_of(6)
    out = decoder.generate(prompt.expand(3, -1), 12, sampling=SamplingParams(1.0, seed=40))
    for row in range(3):
        alone = decoder.generate(prompt, 12, sampling=SamplingParams(1.0, seed=40 + row))
        assert torch.equal(out.new_tokens[row], alone.new_tokens[0])
    assert len({tuple(row) for row in out.new_tokens.tolist()}) == 3


@requires_native
@pytest.mark.parametrize("threshold", [0.0, 0.03])
@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive"])
def test_a_batch_samples_what_each_would_alone(decoder, strategy, threshold):
    """Whatever the others are like: every sequence has parameters, a length and an end of its own."""
    prompts = [prompt_of(3 + 2 * row, row)[0] for row in range(len(SAMPLERS))]
    options = {"strategy": strategy, "draft_threshold": threshold, "eos_token_id": [7, 35]}
    params = [SamplingParams(**{**vars(one), "seed": 100 + row}) for row, one in enumerate(SAMPLERS)]
    out = decoder.generate(prompts, 15, sampling=params, **options)
    for row, prompt in enumerate(prompts):
        alone = decoder.generate(prompt[None], 15, sampling=params[row], **options)
        count = alone.stats.new_tokens
        assert out.per_sequence[row].new_tokens == count
        assert out.new_tokens[row, :count].tolist() == alone.new_tokens[0].tolist()


def test_a_processor_sees_the_whole_history_at_every_position():
    """Prompt, emitted tokens, and the drafts before the position; every position of a round is asked about."""
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 3)
    asked = []
    out = decoder.generate(
        prompt_of(5), 12, logits_processor=lambda history, logits: asked.append(history.tolist()) or logits
    )
    text = out.sequences[0].tolist()
    lengths = [len(history) for history in asked]
    assert lengths[0] == 5
    assert lengths[1:8] == [6, 7, 8, 6, 7, 8, 9], "3 drafts, 4 rows of verification"
    emitted = [history for history in asked if history == text[: len(history)]]
    assert {len(history) for history in emitted} >= set(range(5, 17))
    # What was rejected stands in no later history.
    starts = [index for index, history in enumerate(asked) if history == text[: len(history)]]
    for index in starts:
        assert asked[index][:5] == prompt_of(5)[0].tolist()


def test_no_token_comes_twice_under_a_strict_penalty(decoder):
    """A processor that forbids what the history holds works inside a draft, too."""

    def once(history, logits):
        return logits.index_fill(0, history, -math.inf)

    for strategy in ("autoregressive", "self_speculative"):
        out = decoder.generate(prompt_of(5), 40, strategy=strategy, logits_processor=once)
        assert out.sequences[0].unique().numel() == prompt_of(5).unique().numel() + 40


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.5, 0.5000001])
def test_a_probability_equal_to_the_threshold_is_enough(temperature, threshold):
    """Two tokens are left, each of probability 0.5: a greedy draft goes on at 0.5, and above it there is none; one that
    is drawn ends above it after its first token."""

    def halves(history, logits):
        return torch.full_like(logits, -math.inf).index_fill(0, torch.tensor([7, 9]), 0.0)

    decoder = SelfSpeculativeDecoder(tiny_model(), 1, 4)
    options = {"draft_threshold": threshold, "logits_processor": halves, "eos_token_id": []}
    out = decoder.generate(prompt_of(5), 11, sampling=SamplingParams(temperature, seed=1), **options)
    assert out.stats.records[0].accepted == {0.5: 4}.get(threshold, int(temperature))
    assert set(out.new_tokens[0].tolist()) <= {7, 9}


def threshold_excess(model) -> float:
    """As `excess`, of fewer continuations, drawn through a session with a threshold."""
    params, decoder = SamplingParams(1.2), SelfSpeculativeDecoder(model, EXIT, DRAFTS)
    session = decoder.open_session(500, max_seq_len=8)
    options = {"draft_threshold": 0.3, "eos_token_id": []}
    ids = [session.add(PROMPT, DEPTH, sampling=SamplingParams(1.2, seed=seed), **options) for seed in range(3000)]
    drawn = {request_id: [] for request_id in ids}
    while len(session):
        for update in session.step():
            drawn[update.request_id] += update.tokens
    return chi_square_excess(torch.tensor(list(drawn.values())), exact(model, params))


@many
def test_a_threshold_keeps_the_distribution_of_samples(small):
    assert threshold_excess(small) < LIMIT


@many
def test_dropping_improbable_samples_is_detected(small, monkeypatch):
    """It would favour the probable tokens."""

    def drop(token, logits, drafting, draft_threshold, draws):
        probability = logits.softmax(-1).gather(1, token.clamp_min(0)[:, None])[:, 0]
        drafting = drafting & (probability >= draft_threshold)
        return torch.where(drafting, token, NOT_DRAFTED), drafting

    monkeypatch.setattr(logits_module, "_apply_threshold", drop)
    assert threshold_excess(small) > 2 * LIMIT
