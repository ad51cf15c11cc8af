"""Sampling with drafts on CPUs: refused, or mended and then exact."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from .engines import engine, generate, runner
from .models import prompts

OPTIONS = {"exit_layer": 2, "num_speculations": 3}
TEMPERATURE, TOP_K, TOKENS = 0.8, 3, 3
SAMPLES = 3000
# The 99.9 % point of chi-square with 26 degrees of freedom, one for each text of three out of three tokens but one. The
# seed is fixed, so the test gives one answer; a wrong sampler gives hundreds.
LIMIT = 54.05


def test_a_temperature_is_refused_with_the_reason_and_the_way_out(model):
    from vllm.exceptions import VLLMValidationError

    with engine(model, load_format="layerskip", model_loader_extra_config=OPTIONS) as llm:
        with pytest.raises(VLLMValidationError, match=r"loses it on CPUs .*mend_cpu_sampling"):
            generate(llm, prompts(4), temperature=0.5)
        assert len(generate(llm, prompts(4), tokens=3)[0]) == 3


def test_other_engines_sample(model):
    with engine(model) as llm:
        assert len(generate(llm, prompts(4), tokens=3, temperature=0.5)[0]) == 3


def test_vllm_has_the_defect_that_the_refusal_names():
    """Where this fails, vLLM was mended, and the refusal can go."""
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    from layerskip.vllm.sampling import _expand

    temperature, running = torch.tensor([0.5, 0.0, 0.25]), torch.tensor([2, 3, 6])
    expected = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.25, 0.25])
    assert torch.equal(_expand(temperature, running, 6, 0, 1), expected)
    assert not torch.equal(expand_batch_to_tokens(temperature, running, 6, 0, 1), expected)


@torch.inference_mode()
def exact(model, prompt):
    """Text of `TOKENS` tokens -> its probability."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    texts = {(): 1.0}
    for _ in range(TOKENS):
        longer = {}
        logits = network(torch.tensor([[*prompt, *text] for text in texts])).logits[:, -1] / TEMPERATURE
        for (text, probability), row in zip(texts.items(), logits, strict=True):
            best = row.topk(TOP_K)
            for token, share in zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True):
                longer[(*text, token)] = probability * share
        texts = longer
    return texts


def chi_square(drawn, expected):
    """How far counts are from what the probabilities promise of `SAMPLES`."""
    assert min(expected.values()) * SAMPLES > 5  # the approximation's rule of thumb
    return sum((drawn[text] - SAMPLES * share) ** 2 / (SAMPLES * share) for text, share in expected.items())


@pytest.fixture
def vllms_own_sampler():
    """Put vLLM's functions back afterwards: the engines of the other tests live in this process, too."""
    from vllm.v1.sample import rejection_sampler

    before = rejection_sampler.expand_batch_to_tokens, rejection_sampler.apply_sampling_constraints
    yield
    rejection_sampler.expand_batch_to_tokens, rejection_sampler.apply_sampling_constraints = before


@pytest.mark.usefixtures("vllms_own_sampler")
@pytest.mark.parametrize("drafts", ["greedy", "probabilistic"])
def test_mended_sampling_has_the_models_distribution(model, drafts):
    """Of drafts that are the exit's best tokens, scored by our kernel, and of drafts drawn from vLLM's logits."""
    (prompt,) = prompts(6)
    expected = exact(model, prompt)
    options = {
        "model_loader_extra_config": {**OPTIONS, "mend_cpu_sampling": True},
        "speculative_config": {"draft_sample_method": drafts},
    }
    with engine(model, load_format="layerskip", max_num_seqs=64, **options) as llm:
        drafter, calls = runner(llm).drafter.model, []
        for name in ("get_top_tokens", "compute_logits"):
            watch(drafter, name, calls)
        texts = [prompt] * SAMPLES
        drawn = Counter(map(tuple, generate(llm, texts, tokens=TOKENS, temperature=TEMPERATURE, top_k=TOP_K)))
        assert llm.drafts.accepted > SAMPLES / 10
    assert set(calls) == {"get_top_tokens" if drafts == "greedy" else "compute_logits"}
    assert set(drawn) <= set(expected)
    assert chi_square(drawn, expected) < LIMIT


def watch(module, name, calls):
    """Note the calls of a method."""
    plain = getattr(module, name)
    setattr(module, name, lambda *args: calls.append(name) or plain(*args))


def test_the_limit_is_of_as_many_texts():
    assert len(list(itertools.product(range(TOP_K), repeat=TOKENS))) - 1 == 26
