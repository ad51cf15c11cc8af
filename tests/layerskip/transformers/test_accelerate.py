"""The fused modules inside Hugging Face models: what they compute, what they leave to torch, and what stays."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, random_tokens, tiny_config, tiny_model
from tiny import native_missing

from layerskip import SelfSpeculativeDecoder, UnsupportedModelError, accelerate, adapt, restore
from layerskip.transformers import acceleration
from layerskip_kernels import BackendError, use_backend

# Largest difference of logits, which are of order 1.
TOLERANCES = {
    "fp32": 2e-5,
    # In units of transformers' own error to the fp32 truth of the same bf16 weights, the root of the mean square over
    # 96 rows. The fused modules round no more often, so only chance makes it larger: about 1/sqrt(2 · 96) = 7 %.
    "bf16 rms": 1.1,
}
EVERY = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def some_backend():
    """Where nothing was compiled the reference has to be asked for."""
    with nullcontext() if native_missing() is None else use_backend("reference"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The ops that fused modules ran, with the rows that they were given."""
    seen = []

    def spy(name):
        op = getattr(acceleration, name)

        def spied(*args):
            seen.append((name, args[0].numel() // args[0].shape[-1]))
            return op(*args)

        monkeypatch.setattr(acceleration, name, spied)

    for name in ("rms_norm", "linear", "swiglu"):
        spy(name)
    return seen


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def generate(model, tokens, new_tokens=24, **kwargs):
    mask = torch.ones_like(tokens)
    return model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **kwargs).tolist()


@EVERY
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_gives_the_same_tokens(architecture, batch, calls):
    model, tokens = tiny_model(architecture), random_tokens(batch, 20)
    expected = generate(model, tokens)
    assert not calls
    assert accelerate(model) is model
    assert generate(model, tokens) == expected
    per_layer = {"linear": 5, "swiglu": 1, "rms_norm": 4 if architecture == "qwen3" else 2}
    steps = [op for op, rows in calls if rows == batch]
    assert steps.count("swiglu") == 23 * 4  # the prompt's step gives the first token
    assert steps.count("linear") == 23 * (4 * per_layer["linear"] + 1) + 1  # and a head with the last row alone
    assert [op for op, _ in calls].count("rms_norm") == 24 * (4 * per_layer["rms_norm"] + 1)
    assert generate(restore(model), tokens) == expected


@EVERY
@pytest.mark.parametrize("rows", [1, 5, acceleration.SKINNY_ROWS, acceleration.SKINNY_ROWS + 1])
def test_logits(architecture, rows):
    model, tokens = tiny_model(architecture), random_tokens(1, rows)
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(accelerate(model), tokens), expected, atol=TOLERANCES["fp32"], rtol=0)


@EVERY
def test_bf16_is_as_close_to_the_truth_as_transformers(architecture):
    model, truth_model = tiny_model(architecture, torch.bfloat16), tiny_model(architecture)
    truth_model.load_state_dict(model.state_dict())
    prompts = [random_tokens(1, 8, seed) for seed in range(12)]  # short, so that the fused kernels take them
    truth = torch.cat([logits(truth_model, tokens) for tokens in prompts])

    def error():
        found = torch.cat([logits(model, tokens) for tokens in prompts]).float()
        return (found - truth).square().mean().sqrt()

    own = error()
    accelerate(model)
    assert error() <= TOLERANCES["bf16 rms"] * own


def test_prompts_and_large_batches_take_torchs_matmuls(calls):
    model = accelerate(tiny_model("llama3"))
    logits(model, random_tokens(1, acceleration.SKINNY_ROWS + 1))
    logits(model, random_tokens(acceleration.SKINNY_ROWS + 1, 1))
    assert {op for op, _ in calls} == {"rms_norm"}
    calls.clear()
    logits(model, random_tokens(acceleration.SKINNY_ROWS, 1))
    assert {op for op, _ in calls} == {"rms_norm", "linear", "swiglu"}


@EVERY
def test_gradients_are_those_of_the_plain_model(architecture, calls):
    model, tokens = tiny_model(architecture).train(), random_tokens(2, 5)
    plain = copy.deepcopy(model)
    accelerate(model)
    assert model.training
    for one in (plain, model):
        one(tokens, labels=tokens).loss.backward()
    assert not calls
    for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad), name


def test_a_bias_that_alone_is_trained_gets_its_gradient():
    model, tokens = accelerate(tiny_model("qwen2")), random_tokens(1, 4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    model(tokens, labels=tokens).loss.backward()
    assert all(layer.self_attn.q_proj.bias.grad.abs().sum() > 0 for layer in model.model.layers)


def test_autocast_is_torchs(calls):
    model, tokens = tiny_model("llama2"), random_tokens(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, tokens)
        assert torch.equal(logits(accelerate(model), tokens), expected)
    assert not calls


@EVERY
def test_what_stays_and_what_comes_back(architecture):
    model = tiny_model(architecture)
    state, modules, kinds = model.state_dict(keep_vars=True), list(model.modules()), list(map(type, model.modules()))
    parameters, printed = list(model.parameters()), str(model)
    accelerate(model)
    changed = model.state_dict(keep_vars=True)
    assert list(changed) == list(state)
    assert all(changed[name] is state[name] for name in state)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert sum(isinstance(module, acceleration.FusedSwiGLU) for module in model.modules()) == 4
    assert isinstance(model.lm_head, torch.nn.Linear)
    restore(model)
    assert list(map(type, model.modules())) == kinds
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert str(model) == printed
    assert not any("_layerskip" in key for module in model.modules() for key in module.__dict__)


def test_twice_is_once(calls):
    model, tokens = tiny_model("llama2"), random_tokens(1, 4)
    expected = list(map(type, model.modules()))
    once = logits(accelerate(model), tokens)
    count = len(calls)
    assert torch.equal(logits(accelerate(model), tokens), once)
    assert len(calls) == 2 * count
    restore(restore(model))
    assert list(map(type, model.modules())) == expected


def test_a_plain_model_has_nothing_to_restore():
    model = tiny_model("llama2")
    kinds = list(map(type, model.modules()))
    assert restore(model) is model
    assert list(map(type, model.modules())) == kinds


def test_a_copy_is_accelerated_and_restored_by_itself(calls):
    model, tokens = accelerate(tiny_model("mistral")), random_tokens(1, 4)
    other = copy.deepcopy(model)
    restore(model)
    logits(model, tokens)
    assert not calls
    logits(other, tokens)
    assert calls
    assert list(map(type, restore(other).modules())) == list(map(type, model.modules()))


def test_checkpoints_are_those_of_the_plain_model(tmp_path):
    model, tokens = tiny_model("qwen3"), random_tokens(1, 6)
    expected = logits(model, tokens)
    accelerate(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), expected)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(logits(restore(whole), tokens), expected)


def test_conversions_and_new_weights_are_followed():
    model, tokens = accelerate(tiny_model("llama2")), random_tokens(1, 4)
    other = tiny_model("llama2", seed=5)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(logits(model, tokens), logits(other, tokens), atol=TOLERANCES["fp32"], rtol=0)
    assert logits(model.to(torch.float16), tokens).dtype == torch.float16


@pytest.mark.parametrize("architecture", ["llama2", "qwen3"])
def test_a_dtype_that_the_ops_do_not_have_is_torchs(architecture, calls):
    model, tokens = accelerate(tiny_model(architecture)), random_tokens(1, 6)
    plain = tiny_model(architecture).double()
    assert torch.equal(logits(model.double(), tokens), logits(plain, tokens))
    assert generate(model, tokens) == generate(plain, tokens)
    assert calls == []


def test_hooks_run(calls):
    model, tokens = accelerate(tiny_model("llama2")), random_tokens(1, 4)
    seen = []
    for name in ("norm", "layers.2.mlp", "layers.2.mlp.up_proj", "layers.1.self_attn.k_proj"):
        module = model.model.get_submodule(name)
        module.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    logits(model, tokens)
    assert seen == ["layers.1.self_attn.k_proj", "layers.2.mlp.up_proj", "layers.2.mlp", "norm"]
    assert [op for op, _ in calls].count("swiglu") == 3


def test_an_adapter_that_comes_later_counts(calls):
    peft = pytest.importorskip("peft")
    model, tokens = accelerate(tiny_model("llama2")), random_tokens(1, 4)
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    fast = logits(wrapped, tokens)
    assert "swiglu" not in {op for op, _ in calls}
    torch.testing.assert_close(fast, logits(restore(wrapped), tokens), atol=TOLERANCES["fp32"], rtol=0)


def test_a_model_with_an_adapter(calls):
    """Its base layers take the ops; the feed-forward with an adapter inside is computed as before."""
    peft = pytest.importorskip("peft")
    model, tokens = tiny_model("llama2"), random_tokens(1, 4)
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    active = logits(wrapped, tokens)
    assert accelerate(wrapped) is wrapped
    with wrapped.disable_adapter():
        disabled = logits(wrapped, tokens)
    assert (disabled - active).abs().max() > 0.01
    calls.clear()
    torch.testing.assert_close(logits(wrapped, tokens), active, atol=TOLERANCES["fp32"], rtol=0)
    assert {op for op, _ in calls} == {"linear", "rms_norm"}
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped, tokens), active, atol=TOLERANCES["fp32"], rtol=0)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(restore(wrapped), tokens), active, atol=TOLERANCES["fp32"], rtol=0)


def test_an_accelerated_model_decodes_self_speculatively():
    model, prompt = tiny_model("llama3"), random_tokens(1, 9)
    expected = SelfSpeculativeDecoder(adapt(model), 2, 3).generate(prompt, 16, eos_token_id=[]).sequences
    decoder = SelfSpeculativeDecoder(accelerate(model), 2, 3)
    assert torch.equal(decoder.generate(prompt, 16, eos_token_id=[]).sequences, expected)


@pytest.mark.parametrize("rows", [5, 25])
def test_it_compiles_without_a_graph_break(rows):
    torch.compiler.reset()
    model, tokens, ops = accelerate(tiny_model("qwen3")), random_tokens(1, rows), []

    def record(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=record)(tokens, use_cache=False).logits
    torch.testing.assert_close(compiled, logits(model, tokens), atol=TOLERANCES["fp32"], rtol=0)
    skinny = {"layerskip.swiglu.default", "layerskip.linear.default"} if rows == 5 else set()
    assert {op for op in ops if op.startswith("layerskip.")} == {"layerskip.rms_norm.default"} | skinny


@pytest.mark.parametrize("unsupported", ["architecture", "activation", "quantised", "bias", "dtype"])
def test_what_is_refused_is_left_alone(unsupported):
    model = tiny_model("llama2")
    if unsupported == "architecture":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 11}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    elif unsupported == "activation":
        model.config.hidden_act = "gelu"
    elif unsupported == "quantised":
        model.model.layers[1].mlp.up_proj.__class__ = type("Linear4bit", (torch.nn.Linear,), {})
    elif unsupported == "bias":
        model = transformers.LlamaForCausalLM(tiny_config("llama2", mlp_bias=True))
    else:
        model.lm_head.weight.data = model.lm_head.weight.data.double()
    kinds = list(map(type, model.modules()))
    words = {"architecture": "GPT2LMHeadModel.*supported: llama.*qwen3", "activation": "gelu.*supported: silu",
             "quantised": "Linear4bit.*supported: plain", "bias": "mlp.*bias", "dtype": "lm_head.*float64"}  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=words[unsupported]):
        accelerate(model)
    assert list(map(type, model.modules())) == kinds


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 64}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}],
)
def test_what_only_attention_knows_of_is_no_hindrance(change):
    """A decoder refuses such texts; here attention stays transformers' own."""
    model, tokens = tiny_model("mistral", **change), random_tokens(1, 80)
    with pytest.raises(ValueError, match=r"RoPE type 'dynamic'|max_seq_len=64"):
        SelfSpeculativeDecoder(model).generate(tokens, 24)
    expected = generate(model, tokens)
    assert generate(accelerate(model), tokens) == expected


def test_a_machine_without_kernels_is_told(monkeypatch):
    model = tiny_model("llama2")
    kinds = list(map(type, model.modules()))
    served = acceleration.explain

    def without(*args):
        with use_backend("reference"):
            found = served(*args)
        return type(found)(found.op, found.backend, {"cpu": "no compiler"})

    monkeypatch.setattr(acceleration, "explain", without)
    with pytest.raises(BackendError, match=r"slower.*\n.*no compiler"):
        accelerate(model)
    assert list(map(type, model.modules())) == kinds
    monkeypatch.undo()
    with use_backend("reference"):  # who forces it, gets it
        logits(accelerate(model), random_tokens(1, 4))
