"""Recorded rounds of processed logits: the same tokens, and nothing looked at on the host."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from exits_of import random_exit
from gpus import FakeGPU
from test_graph import tokens_of
from tiny import prompt_of, requires_native, tiny_model

from layerskip import DraftHead, SamplingParams, SelfSpeculativeDecoder, models
from layerskip.decoding import cuda_graphs
from layerskip.decoding.sampling import LogitsControls, LogitsPipeline
from layerskip.decoding.spec_step import LookupDrafts, SequenceTensors, SpecStep

pytestmark = pytest.mark.usefixtures("one_thread")


def three(**values) -> list[SamplingParams]:
    return [SamplingParams(**{"temperature": 1.1, "seed": seed, **values}) for seed in range(3)]


PROCESSED = {
    "top-k": [SamplingParams(1.3, top_k=k, seed=k) for k in (1, 5, 90)],
    "top-p": three(top_p=0.7),
    "min-p": three(min_p=0.05),
    "penalty": three(repetition_penalty=1.8),
    "greedy, penalty": three(temperature=0.0, repetition_penalty=3.0),
    "bias": three(logit_bias={3: 5.0, 9: -math.inf}),
    "each its own": [
        SamplingParams(0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3, logit_bias={3: 2.0}, seed=4),
        SamplingParams(0.0, repetition_penalty=2.0),
        SamplingParams(1.2, top_p=0.8, seed=5),
    ],
}


@pytest.fixture(scope="module")
def decoder() -> SelfSpeculativeDecoder:
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), exit_layer=1, num_speculations=3)


@requires_native
@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive", "early_exit"])
@pytest.mark.parametrize("kind", PROCESSED)
@pytest.mark.parametrize("slots", [2, 5])
def test_the_same_tokens(decoder, slots, kind, strategy):
    gpu, given = FakeGPU(), {"strategy": strategy, "sampling": PROCESSED[kind]}
    assert tokens_of(decoder, slots, gpu, **given) == tokens_of(decoder, slots, None, **given)
    assert gpu.replays > 2 * gpu.captures > 0
    assert gpu.most_unread >= 2


@requires_native
@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_a_threshold_on_drafts(decoder, temperature):
    given = {"sampling": three(temperature=temperature, repetition_penalty=1.2), "draft_threshold": 0.3}
    gpu = FakeGPU()
    assert tokens_of(decoder, 5, gpu, **given) == tokens_of(decoder, 5, None, **given)
    assert gpu.captures > 0


@requires_native
@pytest.mark.parametrize("kind", PROCESSED)
def test_lookup_drafts(decoder, kind):
    given = {"sampling": PROCESSED[kind], "draft_source": "ngram"}
    gpu = FakeGPU()
    assert tokens_of(decoder, 5, gpu, **given) == tokens_of(decoder, 5, None, **given)
    assert gpu.captures > 0


@requires_native
def test_a_reduced_head_that_scores_no_allowed_token():
    head = DraftHead([4, 9, 11], 101)
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 3, draft_head=head)
    given = {"sampling": three(logit_bias={4: -math.inf, 9: -math.inf, 11: -math.inf})}
    gpu = FakeGPU()
    assert tokens_of(decoder, 5, gpu, **given) == tokens_of(decoder, 5, None, **given)
    assert gpu.captures > 0


@requires_native
def test_tokens_of_rounds_in_flight_are_penalized(decoder, monkeypatch):
    """The host reads a round's tokens after the next one began, so only the GPU can note them."""
    given = {"sampling": PROCESSED["greedy, penalty"], "strategy": "autoregressive"}
    expected = tokens_of(decoder, 5, None, **given)
    monkeypatch.setattr(LogitsControls, "see", lambda controls, tokens: None)
    assert tokens_of(decoder, 5, FakeGPU(), **given) != expected


@requires_native
def test_parameter_values_are_not_recorded(decoder):
    """Two batches of one form share their graphs: what they have of their own are tensors."""
    gpu = FakeGPU()
    for index in range(3):
        params = [SamplingParams(0.7 + index / 9, top_k=17 + 5 * index, top_p=0.9 - index / 9, seed=3)] * 3
        given = {"sampling": params, "strategy": "autoregressive"}
        assert tokens_of(decoder, 5, gpu, **given) == tokens_of(decoder, 5, None, **given)
    assert gpu.captures == 9  # each of three sessions has graphs of its own: of one, two and four sequences


@requires_native
def test_an_own_processor_warns_and_is_not_recorded(decoder):
    def louder(history, logits):
        return logits * 1.5

    gpu, given = FakeGPU(), {"logits_processor": louder, "sampling": PROCESSED["top-p"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = tokens_of(decoder, 5, None, **given)
    with pytest.warns(UserWarning, match="the logits processor louder is Python, which a CUDA graph cannot record"):
        assert tokens_of(decoder, 5, gpu, **given) == expected
    assert gpu.captures == 0


@pytest.mark.parametrize("num_draft_layers", [0, 2])
@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_a_round_never_reads_values_on_the_host(threshold, num_draft_layers):
    """On the device "meta" there are none, and no branch for the CPU is taken."""
    model, meta = models.adapt(tiny_model()), torch.device("meta")
    model = model.with_exit(random_exit(model, 1, num_draft_layers).of(model)).to("meta")
    with torch.inference_mode():
        cache = model.decoder.new_cache(4, 64)
        params = PROCESSED["each its own"][:2]
        controls = LogitsControls.of(params, [prompt_of(5)[0]] * 2, model.vocab_size, torch.device("cpu"))
        controls = controls.each(lambda tensor: tensor.to("meta"))
        sequences = SequenceTensors.of([0, 0], [5, 9], [3, 1], [1, 2], [0.8, 0.0], meta)
        sequences = replace(sequences, controls=controls)
        step = SpecStep(model, cache, LogitsPipeline())
        assert step.speculate(sequences, 1, 3, threshold).shape == (2, 5)
        assert step.advance(sequences, model.num_layers).shape == (2, 2)
        lookup = LookupDrafts.of([[1, 2, 3], [4]], 3, model.vocab_size, meta, True)
        assert step.speculate(replace(sequences, lookup=lookup), 1, 3).shape == (2, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PROCESSED)
@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive"])
def test_cuda_graphs_give_the_same_tokens(strategy, kind):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak").to("cuda"), exit_layer=1, num_speculations=3)
    graphs, given = cuda_graphs.for_device(decoder.model.device), {"strategy": strategy, "sampling": PROCESSED[kind]}
    assert tokens_of(decoder, 5, graphs, **given) == tokens_of(decoder, 5, None, **given)
    assert graphs is not None
    assert len(graphs) > 0
