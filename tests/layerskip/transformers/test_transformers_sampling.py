"""Sampling through ``custom_generate=layerskip.generate``: the distribution is transformers' own."""

import math

import helpers
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper
from transformers.generation import TemperatureLogitsWarper

import layerskip
from layerskip.transformers import compatibility

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY, DEPTH = 7, 2
DRAWS, ROWS = 2000, 200
OURS = {"custom_generate": layerskip.generate, "exit_layer": 2, "num_speculations": 2}


@pytest.fixture(scope="module")
def model():
    """A random model, which rejects many drafts of its early layers."""
    return helpers.tiny_model("llama2", vocab_size=VOCABULARY)


class FromHistory(LogitsProcessor):
    """Depends on the last token and on the length."""

    def __call__(self, input_ids, scores):
        liked = (input_ids[:, -1:] + input_ids.shape[1]) % VOCABULARY
        return scores.scatter_add(1, liked, torch.full(liked.shape, 1.2))


OPTIONS = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "truncated": {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    "penalty": {"repetition_penalty": 1.6, "top_k": 0},
    "typical": {"typical_p": 0.8, "top_k": 0},
    "processor": {"top_k": 0, "temperature": 0.8, "logits_processor": LogitsProcessorList([FromHistory()])},
}
PROMPT = torch.tensor([[3, 1, 4]])


def exact(model, **changes):
    """Probabilities [V, V] of the first two tokens, from transformers' own processed scores."""
    table = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    asked = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True, "do_sample": True, **changes}
    prompts = torch.cat([PROMPT.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], 1)
    first = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **asked).scores[0]
    second = model.generate(prompts, attention_mask=torch.ones_like(prompts), **asked).scores[0]
    table += first[0].double().softmax(-1)[:, None] * second.double().softmax(-1)
    return table


def drawn(model, seed=0, **changes):
    """Counts [V, V] of the first two of three tokens, so that they come from prefill, drafts and corrections."""
    torch.manual_seed(seed)
    counts = torch.zeros(VOCABULARY * VOCABULARY, dtype=torch.int64)
    asked = {"do_sample": True, "max_new_tokens": DEPTH + 1, "num_return_sequences": ROWS, **OURS, **changes}
    for _ in range(DRAWS // ROWS):
        out = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **asked)
        first, second = out[:, 3], out[:, 4]
        counts += torch.bincount(first * VOCABULARY + second, minlength=VOCABULARY**2)
    return counts.view(VOCABULARY, VOCABULARY)


def deviation(counts, probabilities):
    """Pearson's chi-square, in standard deviations from its mean; cells of under 5 expected draws are one cell."""
    counts, expected = counts.flatten().double(), probabilities.flatten() * counts.sum()
    assert counts[expected == 0].sum() == 0, "a token that can't be drawn was"
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    kept = expected > 0
    freedom = int(kept.sum()) - 1
    chi_square = ((counts - expected)[kept].square() / expected[kept]).sum()
    return float((chi_square - freedom) / math.sqrt(2 * freedom))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_distribution_is_transformers_own(model, name):
    assert deviation(drawn(model, **OPTIONS[name]), exact(model, **OPTIONS[name])) < 4


def test_the_check_finds_a_wrong_distribution(model):
    assert deviation(drawn(model, temperature=0.6, top_k=0), exact(model, temperature=0.8, top_k=0)) > 8


def test_torchs_seed_names_the_draws(model):
    def draw(seed):
        torch.manual_seed(seed)
        mask = torch.ones_like(PROMPT)
        return model.generate(PROMPT, attention_mask=mask, do_sample=True, max_new_tokens=20, **OURS)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_rows_of_one_prompt_differ(model):
    torch.manual_seed(0)
    mask = torch.ones_like(PROMPT)
    out = model.generate(PROMPT, attention_mask=mask, do_sample=True, max_new_tokens=20, num_return_sequences=5, **OURS)
    assert len(out.unique(dim=0)) == 5


def top_k_of_4_57(k):
    processor = TopKLogitsWarper(k)
    del processor.min_tokens_to_keep
    return processor


@pytest.mark.parametrize(
    ("processors", "parameters"),
    [
        ([], {"temperature": 1.0}),
        ([top_k_of_4_57(5)], {"temperature": 1.0, "top_k": 5}),
        ([TopKLogitsWarper(5, min_tokens_to_keep=2)], None),
        ([TemperatureLogitsWarper(0.5), TopKLogitsWarper(5)], {"temperature": 0.5, "top_k": 5}),
        ([TopKLogitsWarper(5), TemperatureLogitsWarper(0.5)], None),
        ([TopKLogitsWarper(5), TopKLogitsWarper(4)], None),
        ([TopKLogitsWarper(5, filter_value=-1.0)], None),
        ([TopKLogitsWarper(5), FromHistory()], None),
    ],
)
def test_which_processors_the_kernels_do_without(processors, parameters):
    found = compatibility.as_sampling(processors, True, [0])
    assert found == (None if parameters is None else layerskip.SamplingParams(**parameters))
