"""A model that changes after its decoder was made: the next call decodes the model as it is, or says why it cannot."""

from __future__ import annotations

import functools
import gc
from types import MethodType

import pytest
import torch
from exits_of import random_exit
from tiny import prompt_of, tiny_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import layerskip
from layerskip import SelfSpeculativeDecoder, UnsupportedModelError, adapt
from layerskip.models.hf_checks import ModelSnapshot
from layerskip.training import LayerDropout, convert, revert

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 12


def fresh(model):
    return SelfSpeculativeDecoder(model, 1).generate(prompt_of(5), NEW).sequences


def replaced(model):
    model.model.layers[2].mlp.down_proj.weight = nn.Parameter(torch.randn(32, 72))


def assigned(model):
    model.load_state_dict(tiny_model(seed=7).state_dict(), assign=True)


def new_head(model):
    model.lm_head = nn.Linear(32, 101, bias=False)


def converted(model):
    model.to(torch.bfloat16)


def converted_by_replacing(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def fewer_layers(model):
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3


def fewer_that_are_called(model):
    model.config.num_hidden_layers = 3


def in_place(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.randn(101, 1))


@pytest.mark.parametrize("draft_head", ["full", "int8"])
@pytest.mark.parametrize(
    "change",
    [replaced, assigned, new_head, converted, converted_by_replacing, fewer_layers, fewer_that_are_called, in_place],
)
def test_what_changes_is_decoded(change, draft_head):
    model = tiny_model()
    decoder = SelfSpeculativeDecoder(model, 1, draft_head=draft_head)
    before = decoder.generate(prompt_of(5), NEW).sequences
    change(model)
    after = decoder.generate(prompt_of(5), NEW).sequences
    assert torch.equal(after, fresh(model))
    assert decoder.model.dtype == model.dtype
    assert model.dtype == torch.bfloat16 or not torch.equal(before, after)
    head = SelfSpeculativeDecoder(model, 1, draft_head=draft_head).draft_head
    assert torch.equal(decoder.draft_head.head_weight, head.head_weight)
    session = decoder.open_session(1, max_seq_len=40)
    session.add(prompt_of(5), NEW)
    updates = [update for _ in range(40) if len(session) for update in session.step()]
    assert torch.equal(updates[-1].output.sequences, after)


@pytest.mark.parametrize("change", [replaced, assigned, new_head, converted, converted_by_replacing, in_place])
@pytest.mark.parametrize("draft_head", [None, "int8"])
def test_an_exit_is_bound_to_what_has_become_of_the_model(change, draft_head):
    model = tiny_model()
    exit_ = random_exit(adapt(tiny_model()), rank=4)
    decoder = SelfSpeculativeDecoder(model, num_speculations=4, exit=exit_, draft_head=draft_head)
    decoder.generate(prompt_of(5), NEW)
    change(model)
    after = decoder.generate(prompt_of(5), NEW)
    assert torch.equal(after.sequences, fresh(model))
    anew = SelfSpeculativeDecoder(model, num_speculations=4, exit=exit_, draft_head=draft_head)
    assert torch.equal(decoder.draft_head.head_weight, anew.draft_head.head_weight)
    assert after.stats.records == anew.generate(prompt_of(5), NEW).stats.records
    assert decoder.model.decoder.num_draft_layers == 1
    packed = {torch.uint8} if draft_head else set()  # on the CPU, but for norms and a width of 72
    assert {weight.dtype for weight in decoder.model.decoder.draft_layer_weights} == {model.dtype} | packed


def test_an_exit_that_no_longer_fits_is_named():
    model = tiny_model()
    decoder = SelfSpeculativeDecoder(model, exit=random_exit(adapt(model)))
    fewer_layers(model)
    for _ in range(2):  # also when asked again
        with pytest.raises(ValueError, match="the exit is for a model of 4 layers, this one has 3"):
            decoder.generate(prompt_of(5), NEW)


def test_layers_that_are_missing_are_named():
    model = tiny_model()
    decoder = SelfSpeculativeDecoder(model, 1)
    del model.model.layers[3]
    with pytest.raises(UnsupportedModelError, match=r"has 3 layers, and config.num_hidden_layers is 4"):
        decoder.generate(prompt_of(5), NEW)


def test_a_model_of_ours_that_is_converted():
    model = adapt(tiny_model())
    decoder = SelfSpeculativeDecoder(model, exit=random_exit(model))
    model.to(torch.bfloat16)
    out = decoder.generate(prompt_of(5), NEW)
    assert torch.equal(out.sequences, fresh(tiny_model(dtype=torch.bfloat16)))
    assert {weight.dtype for weight in decoder.model.decoder.draft_layer_weights} == {torch.bfloat16}


def test_a_stream_decodes_what_has_changed():
    from helpers import tiny_tokenizer

    model, tokenizer = tiny_model(), tiny_tokenizer("w{:03}")
    decoder = SelfSpeculativeDecoder(model, 1)
    before = "".join(decoder.stream(prompt_of(5), NEW, tokenizer=tokenizer))
    replaced(model)
    after = "".join(decoder.stream(prompt_of(5), NEW, tokenizer=tokenizer))
    assert after != before
    assert after == "".join(SelfSpeculativeDecoder(model, 1).stream(prompt_of(5), NEW, tokenizer=tokenizer))


def test_nothing_is_made_anew_for_nothing():
    model = tiny_model()
    decoder = SelfSpeculativeDecoder(model, 1, draft_head="int8")
    parts = (decoder.model, decoder.draft_head, decoder.controller)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # is shared, and not copied into the draft head
    decoder.generate(prompt_of(5), NEW)
    model.train().eval().requires_grad_(False)
    decoder.generate(prompt_of(5), NEW)
    now = (decoder.model, decoder.draft_head, decoder.controller)
    assert all(one is other for one, other in zip(now, parts, strict=True))


def test_a_decoder_outlives_the_model():
    model = tiny_model()
    decoder, expected = SelfSpeculativeDecoder(model, 1), fresh(model)
    del model
    gc.collect()
    assert torch.equal(decoder.generate(prompt_of(5), NEW).sequences, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_what_it_cannot_become(dtype):
    model = tiny_model()
    decoder = SelfSpeculativeDecoder(model, 1)
    model.to(dtype)
    for _ in range(2):  # also when asked again
        with pytest.raises(UnsupportedModelError, match=f"of dtype {dtype} is not supported"):
            decoder.generate(prompt_of(5), NEW)
    model.to(torch.float32)
    assert torch.equal(decoder.generate(prompt_of(5), NEW).sequences, fresh(model))


# Hooks


def double(module, args, output=None):
    """A hook, before or after a forward."""
    return None


HOOKS = {
    "a layer's": (lambda model: model.model.layers[2].register_forward_hook(double), r"model\.layers\.2,"),
    "before a layer": (lambda model: model.model.layers[1].mlp.register_forward_pre_hook(double), r"layers\.1\.mlp,"),
    "the model's": (lambda model: model.register_forward_hook(double), "hook of the model"),
    "partial": (lambda model: model.lm_head.register_forward_hook(functools.partial(double)), "of lm_head"),
    "all modules'": (lambda model: register_module_forward_hook(double), "of all modules"),
    "before all": (lambda model: register_module_forward_pre_hook(double), "of all modules"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_refused_by_name(kind):
    register, message = HOOKS[kind]
    model = tiny_model()
    decoder, expected = SelfSpeculativeDecoder(model, 1), fresh(model)
    handle = register(model)
    own = {"custom_generate": layerskip.generate, "exit_layer": 1, "num_speculations": 2}
    try:
        for call in (
            lambda: adapt(model),
            lambda: fresh(model),
            lambda: decoder.generate(prompt_of(5), NEW),
            lambda: decoder.open_session(1, max_seq_len=30),
            lambda: model.generate(prompt_of(5), max_new_tokens=NEW, **own),
        ):
            with pytest.raises(
                UnsupportedModelError, match=rf"test_model_changes\.double, .*{message}.* not be called"
            ):
                call()
    finally:
        handle.remove()
    assert torch.equal(decoder.generate(prompt_of(5), NEW).sequences, expected)
    assert torch.equal(model.generate(prompt_of(5), max_new_tokens=NEW, **own), expected)


def test_hooks_of_transformers_only_look():
    model = tiny_model()
    decoder, expected = SelfSpeculativeDecoder(model, 1), fresh(model)
    model(prompt_of(5), output_hidden_states=True)
    model.enable_input_require_grads()
    assert any(module._forward_hooks for module in model.modules())
    assert torch.equal(decoder.generate(prompt_of(5), NEW).sequences, expected)
    assert torch.equal(fresh(model), expected)


@pytest.mark.parametrize("where", ["model.layers.1.mlp", ""])
def test_a_forward_of_one_instance_is_refused_by_name(where):
    model = tiny_model()
    decoder, expected = SelfSpeculativeDecoder(model, 1), fresh(model)
    module = model.get_submodule(where)
    module.forward = functools.partial(type(module).forward, module)
    for call in (lambda: decoder.generate(prompt_of(5), NEW), lambda: adapt(model)):
        with pytest.raises(UnsupportedModelError, match=f"{where or 'the model'} has a forward of its own"):
            call()
    del module.forward
    assert torch.equal(decoder.generate(prompt_of(5), NEW).sequences, expected)


def test_a_class_of_ones_own_is_refused_by_name():
    model = tiny_model()
    decoder = SelfSpeculativeDecoder(model, 1)

    class Louder(type(model.model.layers[1].mlp)):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model.model.layers[1].mlp = Louder(model.config)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp of type test_model_changes\.Louder, whose"):
        decoder.generate(prompt_of(5), NEW)


def test_a_forward_that_was_put_back_is_none():
    """As transformers 4.57 leaves them where it has looked at outputs."""
    model = tiny_model()
    decoder, expected = SelfSpeculativeDecoder(model, 1), fresh(model)
    model.model.layers[1].forward = model.model.layers[1].forward
    assert torch.equal(decoder.generate(prompt_of(5), NEW).sequences, expected)
    assert torch.equal(fresh(layerskip.accelerate(model)), expected)


def test_mixed_precision_of_accelerate_is_refused_until_it_is_unwrapped():
    """As `Accelerator.prepare` and `unwrap_model` do it, without their state, of which a process has one."""
    utils = pytest.importorskip("accelerate.utils", reason="it wraps forwards")
    model = tiny_model()
    model._original_forward = model.forward
    in_bf16 = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(utils.convert_outputs_to_fp32(in_bf16), model)
    with pytest.raises(UnsupportedModelError, match="the model has a forward of its own"):
        fresh(model)
    plain = utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert "forward" in plain.__dict__
    assert torch.equal(fresh(plain), fresh(tiny_model()))


def test_a_model_in_training_is_decoded():
    """What `convert` puts into it decodes as before; what it was put around is looked at."""
    model, expected = tiny_model(), fresh(tiny_model())
    decoder = SelfSpeculativeDecoder(model, 1)
    convert(model, LayerDropout([0.0, 0.5, 0.5, 0.5], seed=1))
    model.train()
    assert torch.equal(decoder.generate(prompt_of(5), NEW).sequences, expected)
    assert torch.equal(fresh(model), expected)
    revert(model)
    model.model.layers[1].forward = lambda hidden, *args, **kwargs: hidden
    convert(model, None)
    for call in (lambda: decoder.generate(prompt_of(5), NEW), lambda: adapt(model)):
        with pytest.raises(UnsupportedModelError, match=r"layers\.1 has a forward of its own"):
            call()


# Adapters and compilation


LORA = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def test_an_active_adapter_is_refused_until_it_is_merged():
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    model = tiny_model()
    decoder, before = SelfSpeculativeDecoder(model, 1), fresh(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    for call in (
        lambda: decoder.generate(prompt_of(5), NEW),
        lambda: SelfSpeculativeDecoder(adapted, 1),
        lambda: SelfSpeculativeDecoder(model, 1),
        lambda: layerskip.generate(model, prompt_of(5), max_new_tokens=2),
    ):
        with pytest.raises(UnsupportedModelError, match=r"adapter.*merge_and_unload\(\)"):
            call()
    merged = adapted.merge_and_unload()
    assert merged is model
    after = decoder.generate(prompt_of(5), NEW).sequences
    assert torch.equal(after, fresh(merged))
    assert not torch.equal(after, before)


def test_one_decoder_follows_every_state_of_its_adapters():
    """As transformers decodes the same model: merged, unmerged, disabled, several, none active."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    model = tiny_model()
    plain = fresh(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    adapted.add_adapter("second", peft.LoraConfig(**{**LORA, "target_modules": ["v_proj"]}))
    adapted.eval()
    texts = []
    with adapted.disable_adapter():
        decoder = SelfSpeculativeDecoder(adapted, 1)

    def served():
        expected = adapted.generate(input_ids=prompt_of(5), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        found = decoder.generate(prompt_of(5), NEW, eos_token_id=[]).sequences
        assert torch.equal(found, expected)
        assert torch.equal(layerskip.generate(adapted, prompt_of(5), max_new_tokens=NEW, exit_layer=1), expected)
        texts.append(found.tolist())

    for names in (["default"], ["second"], ["default", "second"]):
        adapted.base_model.set_adapter(names)
        with pytest.raises(UnsupportedModelError, match=r"_proj has an active adapter of PEFT"):
            decoder.generate(prompt_of(5), NEW)
        adapted.merge_adapter(names)
        served()
        adapted.unmerge_adapter()
        with adapted.disable_adapter():
            served()
        assert texts.pop() == plain.tolist()
    assert len({str(text) for text in [*texts, plain.tolist()]}) == 4
    adapted.merge_adapter()
    with adapted.disable_adapter(), pytest.raises(UnsupportedModelError, match="active adapter"):
        decoder.generate(prompt_of(5), NEW)  # PEFT would first take the adapter out of the weights


def test_other_adapters_of_peft_are_refused():
    peft = pytest.importorskip("peft", reason="adapters need peft")
    for config in (
        peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        adapted = peft.get_peft_model(tiny_model(), config)
        with pytest.raises(UnsupportedModelError, match=r"of PEFT: an adapter other than LoRA"):
            SelfSpeculativeDecoder(adapted, 1)


def test_a_compiled_model_is_unwrapped():
    model = tiny_model()
    compiled, expected = torch.compile(model), fresh(model)
    decoder = SelfSpeculativeDecoder(compiled, 1)
    assert decoder.model.head.head_weight is model.lm_head.weight
    assert torch.equal(decoder.generate(prompt_of(5), NEW).sequences, expected)
    ours = layerskip.generate(compiled, prompt_of(5), max_new_tokens=NEW, exit_layer=1)
    assert torch.equal(ours, expected)
    assert adapt(compiled).embedding is model.model.embed_tokens.weight
    assert layerskip.accelerate(compiled) is compiled
    assert type(model.lm_head).__name__ == "SkinnyLinear"


def test_a_watch_of_an_unchanged_model_sees_nothing():
    model = tiny_model()
    watch = ModelSnapshot(model)
    assert watch.changed() is None
    replaced(model)
    assert watch.changed() is model
