"""Figures of `layerskip.training.exit_analysis` against what transformers gives the long way, on a tiny model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import quantized_checkpoints as layouts
import torch

from layerskip.models import adapt
from layerskip.models.adaptation import dequantized
from layerskip.training.data import Example
from layerskip.training.exit_analysis import analyze_exits, evaluate_exits, perplexity

transformers = pytest.importorskip("transformers", reason="needs transformers")

EXAMPLES = [Example("on a", " lamp", "1"), Example("off b", " fan on", "2"), Example("to c", " x", "3")]


class Letters:
    """A tokenizer of one token a character; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[1 + (ord(letter) - 32) % 63 for letter in text])


@pytest.fixture(scope="module")
def model():
    """Four layers of which the last two do nothing, trained until it knows the examples."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers[2:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    optimizer = torch.optim.Adam(model.model.layers[:2].parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        for example in EXAMPLES:
            context = Letters()(example.prompt).input_ids
            ids = torch.tensor([[*context, *Letters()(example.completion).input_ids, 0]])
            labels = ids.clone()
            labels[:, : len(context)] = -100
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def _generated(model, example):
    ids = torch.tensor([Letters()(example.prompt).input_ids])
    limit = len(example.completion) + 1
    return model.generate(input_ids=ids, max_new_tokens=limit, do_sample=False)[0, ids.shape[1] :].tolist()


@torch.no_grad()
def _right(model, example):
    context, target = Letters()(example.prompt).input_ids, [*Letters()(example.completion).input_ids, 0]
    choice = model(input_ids=torch.tensor([context + target])).logits[0, len(context) - 1 : -1].argmax(-1)
    return int((choice == torch.tensor(target)).sum())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_exact_match_is_what_greedy_generation_writes(model, batch_size):
    asked = [*EXAMPLES, Example("on a", " lamb", "4"), Example("off b", " fan", "5")]
    written = [_generated(model, e) == [*Letters()(e.completion).input_ids, 0] for e in asked]
    report = evaluate_exits(model, Letters(), asked, [4], batch_size)
    assert report.exact_match == sum(written) / len(asked) == 0.6
    assert report.examples == 5
    assert report.tokens == sum(len(e.completion) + 1 for e in asked)


def test_agreement_compares_with_the_last_layer_and_accuracy_with_the_labels(model):
    asked = [*EXAMPLES, Example("on a", " lamb", "4")]
    report = evaluate_exits(model, Letters(), asked, [1, 2, 3, 4])
    assert report.agreement[2] == report.agreement[3] == report.agreement[4] == 1.0
    assert report.agreement[1] < 1.0
    assert report.accuracy[4] == sum(_right(model, example) for example in asked) / report.tokens < 1.0
    assert report.accuracy[1] < report.accuracy[2] == report.accuracy[4]


def test_perplexity_is_exp_of_the_mean_loss_over_windows(model):
    texts = ["to be or not to be, that", "is short", "the question whether it is"]
    windows = [torch.tensor([Letters()(text).input_ids[at : at + 12]]) for text in texts for at in (0, 12)]
    losses = [float(model(input_ids=w, labels=w).loss.detach()) for w in windows if w.shape[1] == 12]
    expected = math.exp(sum(losses) / len(losses))
    assert len(losses) == 4
    assert perplexity(model, Letters(), texts, window=12) == pytest.approx(expected, rel=1e-5)  # fp32 sums reordered
    first = math.exp(losses[0])
    assert perplexity(model, Letters(), texts, window=12, limit=1) == pytest.approx(first, rel=1e-5)


def test_bad_requests_are_named(model):
    with pytest.raises(ValueError, match="exit 5 is outside 1 … 4"):
        evaluate_exits(model, Letters(), EXAMPLES, [2, 5])
    with pytest.raises(ValueError, match="no examples"):
        evaluate_exits(model, Letters(), [], [2])
    with pytest.raises(ValueError, match="no text is as long as a window of 512"):
        perplexity(model, Letters(), ["short"])


class TestOfThisLibrarysModels:
    """A `LayerSkipModel` is evaluated as the model of transformers that has what its weights mean."""

    @pytest.fixture(params=[None, "int4"])
    def pair(self, request):
        made = adapt(layouts.tiny(vocab_size=64))
        made = made if request.param is None else made.quantize(request.param)
        return made, dequantized(made)

    def test_exits(self, pair):
        ours, theirs = (evaluate_exits(model, Letters(), EXAMPLES, [1, 3, 4], 2) for model in pair)
        assert ours == theirs
        assert ours.agreement[1] < 1

    def test_perplexity(self, pair):
        texts = ["to be or not to be, that", "the question whether it is"]
        ours, theirs = (perplexity(model, Letters(), texts, window=12) for model in pair)
        assert ours == pytest.approx(theirs, rel=1e-5)

    def test_exit_analysis(self, pair):
        texts = [(torch.arange(3, 15), 4), (torch.arange(20, 26), 2), (torch.arange(5), 5)]
        ours, theirs = (analyze_exits(model, texts) for model in pair)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.allclose(ours.confidence, theirs.confidence, atol=1e-5)
        assert ours.lengths == theirs.lengths == (8, 4)
        with pytest.raises(ValueError, match="no continuation"):
            analyze_exits(pair[0], [(torch.arange(5), 5)])
