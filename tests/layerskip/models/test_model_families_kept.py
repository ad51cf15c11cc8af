"""Families whose layers differ from Llama's: shared storage, packed weights, training, windows, and what is refused."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import quantized_checkpoints as layouts
import torch
from families_of import EVERY, assert_equal_logits, greedy, logits_of, run, weak
from helpers import random_tokens, tiny_model, tiny_tokenizer
from tiny import prompt_of
from transformers import AutoModelForCausalLM

import layerskip
from layerskip import SelfSpeculativeDecoder
from layerskip.models import UnsupportedModelError, adapt, gather_weights, load, save, scatter_weights
from layerskip.models.adaptation import dequantized
from layerskip.models.architectures import named_weights
from layerskip.models.checkpoints.gguf import check_architecture
from layerskip.training import convert, revert
from layerskip.training.exit_analysis import full_head, hidden_states
from layerskip_kernels.formats import is_packed

TOLERANCES = {
    "cross-entropy": 1e-5,  # of order 5, the same sums in another order
    "gradients": 1e-4,  # relative
}
EXPERTS = pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
pytestmark = pytest.mark.usefixtures("one_thread")


def change(model):
    """Other weights, in the same memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1]))


def wide(family, **changes):
    """Of widths of 64, 96 and 32, which the groups of packed weights divide."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {} if "phi" in family else {"head_dim": 16}
    sizes |= {"moe_intermediate_size": 32} if family == "qwen3moe" else {}
    return tiny_model(family, **{**sizes, **changes})


def last(session, prompt):
    """The new tokens of one more request."""
    session.add(prompt, 12)
    while len(session):
        for update in session.step():
            output = update.output
    return output.new_tokens


class TestStorage:
    @EVERY
    def test_every_weight_is_shared(self, family):
        hf = tiny_model(family)
        model = adapt(hf)
        assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in hf.parameters()}
        storages = {p.untyped_storage().data_ptr() for p in hf.parameters()}
        flat = model.decoder.layer_weights(0, model.num_layers)
        assert {w.untyped_storage().data_ptr() for w in flat if w.dim() > 1} <= storages

    @EVERY
    @pytest.mark.parametrize("draft_head", ["full", "int8"])
    def test_a_change_in_place_is_seen(self, family, draft_head):
        """By what drafts, too: a copied head that keeps an old norm drafts other tokens."""
        hf, prompt = weak(family), prompt_of(7)
        decoder = SelfSpeculativeDecoder(hf, 2, 3, draft_head=draft_head)
        before = decoder.generate(prompt, 12).new_tokens.tolist()
        change(hf)
        expected, out = greedy(hf, prompt, 12), decoder.generate(prompt, 12)
        assert out.new_tokens.tolist() == expected != before
        fresh = SelfSpeculativeDecoder(hf, 2, 3, draft_head=draft_head).generate(prompt, 12)
        assert out.stats.records == fresh.stats.records

    @EVERY
    def test_an_open_session_sees_a_change_in_place(self, family):
        hf, prompt = weak(family), prompt_of(7)
        session = SelfSpeculativeDecoder(hf, 2, 3).open_session(2, max_seq_len=32)
        before = last(session, prompt).tolist()
        change(hf)
        assert last(session, prompt).tolist() == greedy(hf, prompt, 12) != before

    @pytest.mark.parametrize("family", ["phi3", "smollm3", "granite", "olmo2", "gemma3"])
    def test_nothing_plain_is_kept_of_what_is_packed(self, family):
        """Views of what Phi-3 has in one matrix would keep all of it."""
        model = adapt(layouts.tiny(family))
        plain = {weight.data_ptr() for weight in model.parameters() if weight.dim() == 2}
        packed = model.quantize("int8", release=True)
        with_memory = {torch.Tensor, torch.nn.Parameter}  # a compiler's stand-ins have none
        tensors = (one for one in gc.get_objects() if type(one) in with_memory)
        matrices = (one for one in tensors if one.dim() == 2 and one.dtype == torch.float32)
        kept = [list(one.shape) for one in matrices if one.untyped_storage().data_ptr() in plain]
        assert packed.weights == "int8"
        assert kept == []

    @EVERY
    def test_the_head_of_transformers_is_whole(self, family):
        """What perplexity is computed from: Granite scales its logits outside the head."""
        hf, ids = tiny_model(family), prompt_of(9).view(1, -1)
        model, full = adapt(hf), hf.config.num_hidden_layers
        with torch.no_grad():
            found, expected = full_head(model)(hidden_states(model, ids, [full])[full][0]), hf(ids).logits[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @EVERY
    def test_other_memory_is_seen(self, family):
        hf, prompt = weak(family), prompt_of(7)
        decoder, expected = SelfSpeculativeDecoder(hf, 2, 3), greedy(hf, prompt, 12)
        for move in (gather_weights, scatter_weights):
            old = [(parameter, parameter.data) for parameter in hf.parameters()]
            move(hf)
            for parameter, data in old:
                assert parameter.data_ptr() != data.data_ptr()
                data.fill_(torch.nan)
            assert decoder.generate(prompt, 12).new_tokens.tolist() == expected

    @EVERY
    @pytest.mark.parametrize("convert_which", ["adapted", "original"])
    def test_conversion(self, family, convert_which):
        hf, prompt = weak(family), prompt_of(7)
        model = adapt(hf)
        model.decoder.new_cache(1, 8)
        (model if convert_which == "adapted" else hf).to(torch.bfloat16)
        assert model.dtype == hf.dtype == torch.bfloat16
        model.refresh()
        expected = SelfSpeculativeDecoder(weak(family, torch.bfloat16), 2, 3).generate(prompt, 12)
        assert SelfSpeculativeDecoder(model, 2, 3).generate(prompt, 12).new_tokens.equal(expected.new_tokens)

    @EVERY
    def test_saved_and_loaded(self, family, tmp_path):
        hf, prompt = weak(family), prompt_of(7)
        hf.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        loaded, _ = load(tmp_path, torch.float32)
        expected = greedy(hf, prompt, 12)
        assert SelfSpeculativeDecoder(loaded, 2, 3).generate(prompt, 12).new_tokens.tolist() == expected


class TestPacked:
    @EVERY
    def test_it_decodes_saves_and_loads(self, family, tmp_path):
        hf = wide(family)
        model, prompt = adapt(hf).quantize("int8"), prompt_of(7)
        assert model.weights == "int8"
        out = SelfSpeculativeDecoder(model, 2, 3).generate(prompt, 12).new_tokens.tolist()
        assert (
            SelfSpeculativeDecoder(model, 2, 3).generate(prompt, 12, strategy="autoregressive").new_tokens.tolist()
            == out
        )
        save(model, tmp_path, tiny_tokenizer())
        loaded, _ = load(tmp_path, torch.float32)
        assert loaded.weights == "int8"
        assert SelfSpeculativeDecoder(loaded, 2, 3).generate(prompt, 12).new_tokens.tolist() == out
        calibrated = adapt(hf).quantize("int8", calibration=[random_tokens(1, 40)[0]])
        assert calibrated.weights == "int8"

    @pytest.mark.parametrize("family", ["phi3", "smollm3", "granite", "olmo2", "gemma3"])
    def test_a_checkpoint_of_llm_compressor(self, family, tmp_path):
        made = layouts.tiny(family, **({} if family == "phi3" else {"head_dim": 32}))
        meant = layouts.write(tmp_path / "model", made, layouts.compressed("pack-quantized", 8, 32))
        model, _ = load(tmp_path / "model", torch.float32)
        assert model.weights == "float32+int8"
        prompt = prompt_of(9)
        with torch.no_grad():
            torch.testing.assert_close(dequantized(model)(prompt).logits, meant(prompt).logits, atol=1e-5, rtol=0)
        assert SelfSpeculativeDecoder(model, 2).generate(prompt, 12).new_tokens.tolist() == greedy(meant, prompt, 12)

    def test_gguf_of_others_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="a GGUF file of model_type 'gemma3_text', is not supported"):
            check_architecture(Path("x.gguf"), "gemma3_text")

    @pytest.mark.parametrize("weights", ["int8", "int4"])
    @EXPERTS
    def test_experts_are_what_their_numbers_stand_for(self, family, weights):
        model = adapt(wide(family)).quantize(weights)
        held = model.decoder.layer_parameters(1)
        assert {name for name in held if is_packed(held[name])} == set("qkvo") | {"experts_in", "experts_out"}
        tokens = random_tokens(2, 12)
        with torch.no_grad():
            expected = dequantized(model)(tokens).logits
        assert_equal_logits(logits_of(model, run(model, tokens, [0, 5, 6, 12], 2)), expected)
        assert gather_weights(model) is not None
        assert_equal_logits(logits_of(model, run(model, tokens, [0, 5, 6, 12], 2)), expected)

    @EXPERTS
    def test_experts_are_packed_as_they_load(self, family, tmp_path):
        wide(family).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        steps = []
        loaded, _ = load(tmp_path, torch.float32, "int8", progress=lambda done, total: steps.append((done, total)))
        assert steps == [(done, 26) for done in range(1, 27)]  # 6 of each of 4 layers, head and embedding
        found, expected = (named_weights(one) for one in (loaded, adapt(wide(family)).quantize("int8")))
        assert found.keys() == expected.keys()
        assert all(found[name].equal(weight) for name, weight in expected.items())

    @EXPERTS
    def test_broken_experts_are_refused(self, family):
        broken = wide(family)
        broken.model.layers[2].mlp.experts.down_proj.data[1, 3, 7] = torch.nan
        with pytest.raises(ValueError, match="layer 2: experts_out: row 67 of the weight to quantize holds NaN"):
            adapt(broken).quantize("int8", release=True)
        with pytest.raises(ValueError, match="experts_out of the layers: int8_g128 takes widths that are"):
            adapt(wide(family, hidden_size=128, head_dim=32)).quantize("int8_g128")

    @EXPERTS
    def test_packed_experts_inside_transformers_are_refused(self, family, tmp_path):
        save(adapt(wide(family)).quantize("int8"), tmp_path, tiny_tokenizer())
        with pytest.raises(UnsupportedModelError, match=r"packed experts inside transformers \(model\.layers\.0\.mlp"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


class TestTraining:
    @EVERY
    def test_losses_are_those_of_each_exit(self, family):
        model, ids = tiny_model(family), random_tokens(3, 9)
        exits, weights = (1, 3, 4), torch.tensor([0.2, 0.3, 0.5])
        states = []
        hooks = [layer.register_forward_hook(lambda *given: states.append(given[2])) for layer in model.model.layers]
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        scaling = getattr(model.config, "logits_scaling", 1.0)
        expected = torch.stack([
            torch.nn.functional.cross_entropy(
                (model.lm_head(model.model.norm(states[e - 1])) / scaling)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
            for e in exits
        ])  # fmt: skip
        slopes = torch.autograd.grad((weights * expected).sum(), list(model.parameters()), allow_unused=True)
        convert(model)
        out = model(input_ids=ids, labels=ids, exit_layers=exits, exit_weights=weights)
        found = torch.autograd.grad(out["loss"], list(model.parameters()), allow_unused=True)
        revert(model)
        tolerance = TOLERANCES["cross-entropy"]
        torch.testing.assert_close(out["exit_losses"], expected.detach(), rtol=0, atol=tolerance)
        for actual, wanted in zip(found, slopes, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=TOLERANCES["gradients"], atol=tolerance)


WINDOWS = {
    "mistral": {"sliding_window": 20},
    "phi3": {"sliding_window": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    "smollm3": {"use_sliding_window": True, "sliding_window": 20},
}


@pytest.mark.parametrize("architecture", list(WINDOWS))
class TestWindows:
    """Models whose layers see a window, where the fused layers see all: they serve as far as that is the same."""

    def test_within_the_window_tokens_are_transformers(self, architecture):
        hf, prompt = tiny_model(architecture, **WINDOWS[architecture]), prompt_of(8)
        decoder = SelfSpeculativeDecoder(hf, 2, 3)
        assert decoder.max_seq_len == 20
        expected = greedy(hf, prompt, 12)
        for strategy in ("self_speculative", "autoregressive"):
            assert decoder.generate(prompt, 12, strategy=strategy).new_tokens.tolist() == expected
        drawn = decoder.generate(prompt, 12, sampling=layerskip.SamplingParams(0.8, seed=1))
        assert drawn.new_tokens.shape == (1, 12)

    def test_past_the_window_it_is_refused(self, architecture):
        hf, prompt = tiny_model(architecture, **WINDOWS[architecture]), prompt_of(8)
        decoder = SelfSpeculativeDecoder(hf, 2, 3)
        with pytest.raises(ValueError, match="make 21, more than max_seq_len=20"):
            decoder.generate(prompt, 13)
        with pytest.raises(ValueError, match=r"max_seq_len 21 exceeds the 20 positions .* fit into its sliding"):
            SelfSpeculativeDecoder(hf, 2, 3, max_seq_len=21)

    def test_past_the_window_layers_give_no_token(self, architecture):
        """Whoever calls them by themselves: never a wrong one."""
        model, tokens = adapt(tiny_model(architecture, **WINDOWS[architecture])), random_tokens(1, 24)
        hidden = model.decoder(model.embed(tokens), model.decoder.new_cache(1, 32))
        found = model.head(hidden).token[0]
        assert (found[:20] >= 0).all()
        assert found[20:].tolist() == [-1] * 4
        with pytest.raises(ValueError, match="24 rows after 0 positions are more than the 20 of the window"):
            model.decoder.prefill(model.embed(tokens), model.decoder.new_cache(1, 32))


def test_longrope_serves_as_far_as_the_short_factors_do():
    assert SelfSpeculativeDecoder(tiny_model("phi4mini"), 2, 3).max_seq_len == 252


REFUSED = {
    "experts in some layers": (
        lambda: tiny_model("qwen3moe", mlp_only_layers=[1]), r"mlp_only_layers \[1\] is not supported; supported: \[\] "
    ),
    "Gemma's soft caps": (lambda: tiny_model("gemma3", final_logit_softcapping=30.0), r"final_logit_softcapping 30\.0"),
    "both directions": (
        lambda: tiny_model("gemma3", use_bidirectional_attention=True), "use_bidirectional_attention True"
    ),
    "Granite without residual": (lambda: tiny_model("granite", residual_multiplier=0.0), r"residual_multiplier 0\.0"),
    "a bias of OLMo 2": (lambda: tiny_model("olmo2", attention_bias=True), r"parameter .*_proj\.bias"),
    "another activation of Gemma": (
        lambda: tiny_model("gemma3", hidden_activation="relu"), "hidden_activation 'relu' .*gelu_pytorch_tanh"
    ),
    "partial rotation elsewhere": (
        lambda: tiny_model("llama2", rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        r"partial_rotary_factor 0\.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        adapt(make())
