"""A converted model: its losses against transformers' own states, gradients, dropout per sample, and the way back."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import ARCHITECTURES, random_tokens, tiny_model
from transformers import Trainer, TrainingArguments

from layerskip.models import UnsupportedModelError
from layerskip.training import LayerDropout, convert, revert

TOLERANCES = {"fp32": 1e-5}  # cross-entropies of order 5, the same sums in another order
LAYERS = 4


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These models are tiny."""


def model_and_batch(architecture: str = "llama2", batch: int = 3, length: int = 9):
    model = tiny_model(architecture)
    ids = random_tokens(batch, length)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 6:] = -100
    return model, ids, labels


def by_hand(model, ids: torch.Tensor, labels: torch.Tensor, exit_layer: int) -> torch.Tensor:
    """Loss of one exit from transformers' hidden states, of which the last is already normed."""
    states = model(ids, output_hidden_states=True).hidden_states
    normed = states[-1] if exit_layer == LAYERS else model.model.norm(states[exit_layer])
    logits = model.lm_head(normed)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_are_those_of_the_states_after_each_exit(architecture: str) -> None:
    model, ids, labels = model_and_batch(architecture)
    exits, weights = (1, 3, LAYERS), torch.tensor([0.2, 0.3, 0.5])
    expected = torch.stack([by_hand(model, ids, labels, e) for e in exits])
    expected_gradients = torch.autograd.grad((weights * expected).sum(), list(model.parameters()))
    convert(model)
    out = model(input_ids=ids, labels=labels, exit_layers=exits, exit_weights=weights)
    torch.testing.assert_close(out["exit_losses"], expected.detach(), rtol=0, atol=TOLERANCES["fp32"])
    torch.testing.assert_close(out["loss"], (weights * expected).sum(), rtol=0, atol=TOLERANCES["fp32"])
    assert out["num_labels"] == int((labels[:, 1:] != -100).sum())
    gradients = torch.autograd.grad(out["loss"], list(model.parameters()))
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=TOLERANCES["fp32"])


@pytest.mark.parametrize("exits", [(1, 3), (1, 3, LAYERS), (LAYERS,)])
def test_a_sampled_head_is_a_head_of_these_tokens_for_the_early_exits(exits: tuple[int, ...]) -> None:
    model, ids, labels = model_and_batch()
    weights = torch.linspace(0.2, 0.5, len(exits))
    sample = torch.cat([labels[labels >= 0], torch.tensor([0, 7])]).unique()
    assert len(sample) < model.config.vocab_size
    states = model(ids, output_hidden_states=True).hidden_states
    targets = labels[:, 1:].flatten()
    places = torch.where(targets >= 0, torch.searchsorted(sample, targets), -100)
    expected = []
    for exit_layer in exits:
        if exit_layer == LAYERS:
            expected.append(by_hand(model, ids, labels, exit_layer))
        else:
            logits = model.lm_head(model.model.norm(states[exit_layer]))[:, :-1, sample]
            expected.append(F.cross_entropy(logits.flatten(0, 1), places, ignore_index=-100))
    convert(model)
    batch = {"input_ids": ids, "labels": labels, "exit_layers": exits, "exit_weights": weights}
    out = model(**batch, head_sample=sample)
    torch.testing.assert_close(out["exit_losses"], torch.stack(expected).detach(), rtol=0, atol=TOLERANCES["fp32"])
    torch.testing.assert_close(out["loss"], (weights * torch.stack(expected)).sum(), rtol=0, atol=TOLERANCES["fp32"])
    whole = model(**batch, head_sample=torch.arange(model.config.vocab_size))
    torch.testing.assert_close(whole["exit_losses"], model(**batch)["exit_losses"])


def test_a_sampled_head_on_wrong_input() -> None:
    model, ids, labels = model_and_batch()
    convert(model)
    batch = {"input_ids": ids, "labels": labels, "exit_weights": torch.ones(2) / 2}
    with pytest.raises(ValueError, match="the sampled vocabulary lacks a target"):
        model(**batch, exit_layers=(1, 2), head_sample=labels[labels >= 0].unique()[1:])
    with pytest.raises(ValueError, match=r"the exit layers of a loss must ascend, got \[2, 1\]"):
        model(**batch, exit_layers=(2, 1))


def test_every_block_gets_gradient_even_with_a_shallow_exit() -> None:
    model, ids, labels = model_and_batch()
    convert(model)
    model(input_ids=ids, labels=labels, exit_layers=(1, LAYERS), exit_weights=torch.ones(2) / 2)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_layers_above_the_deepest_exit_neither_run_nor_get_gradient(checkpointing: bool) -> None:
    model, ids, labels = model_and_batch()
    expected, logits = torch.stack([by_hand(model, ids, labels, e) for e in (1, 2)]), model(ids).logits
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    convert(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    out = model(input_ids=ids, labels=labels, exit_layers=(1, 2), exit_weights=torch.ones(2) / 2)
    assert ran == [0, 1]
    torch.testing.assert_close(out["exit_losses"], expected.detach(), rtol=0, atol=TOLERANCES["fp32"])
    out["loss"].backward()
    assert set(ran) == {0, 1}
    for index, layer in enumerate(model.model.layers):
        assert all((parameter.grad is not None) == (index < 2) for parameter in layer.parameters())
    assert torch.equal(model(ids).logits, logits)


def test_report_gives_each_exits_choices() -> None:
    model, ids, labels = model_and_batch()
    states = model(ids, output_hidden_states=True).hidden_states
    rows = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
    expected = model.lm_head(model.model.norm(states[2])).argmax(-1)[rows], model(ids).logits.argmax(-1)[rows]
    convert(model)
    out = model(input_ids=ids, labels=labels, exit_layers=(2, LAYERS), exit_weights=torch.ones(2), report=True)
    assert torch.equal(out["tokens"], torch.stack(expected))
    assert torch.equal(out["targets"], labels[:, 1:][labels[:, 1:] != -100])


def test_dropping_a_layer_for_a_sample_is_running_the_rest_without_it() -> None:
    model, ids, _ = model_and_batch(batch=4)
    dropout = LayerDropout([0.5] * LAYERS, seed=1)
    kept = dropout.draw(0, 4)
    assert 0 < int((~kept).sum()) < kept.numel()
    conversion = convert(model, dropout)
    model.train()
    conversion._dropping = True
    states = conversion.states((2, LAYERS), input_ids=ids)
    revert(model)
    for sample in range(4):
        alone = tiny_model("llama2")
        layers = [layer for index, layer in enumerate(alone.model.layers) if kept[index, sample]]
        alone.model.layers = torch.nn.ModuleList(layers)
        alone.model.config.num_hidden_layers = len(layers)
        expected = alone(ids[sample : sample + 1], output_hidden_states=True, use_cache=False).hidden_states
        raw = states[1][sample : sample + 1]
        torch.testing.assert_close(alone.model.norm(raw), expected[-1], rtol=0, atol=TOLERANCES["fp32"])
        depth = int(kept[:2, sample].sum())
        if depth < len(layers):
            torch.testing.assert_close(states[0][sample], expected[depth][0], rtol=0, atol=TOLERANCES["fp32"])


def test_dropout_rests_in_evaluation_and_in_ordinary_calls() -> None:
    model, ids, labels = model_and_batch()
    before = model(ids).logits
    convert(model, LayerDropout([1.0] * LAYERS))
    model.eval()
    out = model(input_ids=ids, labels=labels, exit_layers=(LAYERS,), exit_weights=torch.ones(1))
    assert torch.isfinite(out["loss"])
    model.train()
    assert torch.equal(model(ids).logits, before)


def test_everything_dropped_leaves_the_embedding() -> None:
    model, ids, labels = model_and_batch()
    dropout = LayerDropout([1.0] * LAYERS)
    convert(model, dropout)
    dropout.draw(0, ids.shape[0])
    model.train()
    out = model(input_ids=ids, labels=labels, exit_layers=(1, LAYERS), exit_weights=torch.ones(2))
    assert out["exit_losses"][0] == out["exit_losses"][1]
    out["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_revert_leaves_the_model_as_it_was() -> None:
    model, ids, _ = model_and_batch()
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    keys, logits = list(model.state_dict()), model(ids).logits
    convert(model, LayerDropout([0.1] * LAYERS))
    assert list(model.state_dict()) == keys
    assert torch.equal(model(ids).logits, logits)
    revert(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert torch.equal(model(ids).logits, logits)
    revert(model)
    convert(model)


def test_gradient_checkpointing_repeats_the_same_dropout() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, ids, labels = model_and_batch()
        dropout = LayerDropout([0.5] * LAYERS, seed=1)
        dropout.draw(0, ids.shape[0])
        convert(model, dropout)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=labels, exit_layers=(2, LAYERS), exit_weights=torch.ones(2))["loss"].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_a_peft_model_is_converted_inside() -> None:
    peft = pytest.importorskip("peft")
    model, ids, labels = model_and_batch()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    convert(adapted)
    adapted(input_ids=ids, labels=labels, exit_layers=(2, LAYERS), exit_weights=torch.ones(2))["loss"].backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}


def test_what_cannot_be_converted() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model, ids, labels = model_and_batch()
    with pytest.raises(ValueError, match="3 dropout rates were given for 4 layers"):
        convert(model, LayerDropout([0.1] * 3))
    convert(model)
    with pytest.raises(ValueError, match="already converted"):
        convert(model)
    with pytest.raises(ValueError, match="exit layer 5 is not within 1…4"):
        model(input_ids=ids, labels=labels, exit_layers=(5,), exit_weights=torch.ones(1))
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        convert(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)))


def test_a_converted_model_in_a_plain_trainer(tmp_path) -> None:
    """The Trainer keeps the columns that the forward's signature names."""
    model, ids, labels = model_and_batch()
    plain = inspect.signature(model.forward)
    convert(model)
    assert inspect.signature(model.forward) == plain
    rows = [{"input_ids": one, "labels": own} for one, own in zip(ids, labels, strict=True)]
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    result = Trainer(model, settings, train_dataset=rows).train()
    assert 0 < result.training_loss < 10
