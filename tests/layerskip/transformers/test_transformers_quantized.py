"""Models that transformers has loaded quantized: decoded from what its modules hold."""

from __future__ import annotations

import importlib.util
import types

import held_models
import pytest
import quantized_checkpoints as layouts
import torch
import transformers
from held_models import generated, held

import layerskip
from layerskip import SelfSpeculativeDecoder, UnsupportedModelError, adapt, gather_weights
from layerskip.models import ModelFileError, load
from layerskip.models.adaptation import dequantized

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = torch.tensor([[3, 7, 12, 5, 40, 9]])
SPECULATION = {"exit_layer": 2, "num_speculations": 3}
OURS = {"custom_generate": layerskip.generate, "max_new_tokens": 16, **SPECULATION}

TORCH = "gptqmodel.nn_modules.qlinear.torch.TorchLinear"
TRITON = "gptqmodel.nn_modules.qlinear.tritonv2.TritonV2Linear"
AWQ = "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear"
W4A16 = layouts.compressed("pack-quantized", 4, 32)
HELD = {
    "W4A16": (W4A16, "compressed"),
    "W4A16 with zero points": (layouts.compressed("pack-quantized", 4, 32, symmetric=False), "compressed"),
    "W8A16": (layouts.compressed("pack-quantized", 8, None), "compressed"),
    "W8A16 in bytes": (layouts.compressed("int-quantized", 8, None), "compressed"),
    "FP8 per output": (layouts.float8("channel"), "compressed"),
    "FP8 in blocks": (layouts.float8("block"), "compressed"),
    "transformers' fp8": (layouts.fine_grained(), "fp8"),
    "gptq": (layouts.gptq(4, 128, True), TORCH),
    "gptq with zero points": (layouts.gptq(4, 32, False), TRITON),
    "gptq 8 bits": (layouts.gptq(8, 32, True), TORCH),
    "gptq v2": (layouts.gptq(4, 32, False, "gptq_v2"), TORCH),
    "awq": (layouts.awq(128), AWQ),
    "autoawq": (layouts.awq(32), "awq.modules.linear.gemm.WQLinear_GEMM"),
}


def made(directory, layout=W4A16, kind="compressed", architecture="llama2", **changes):
    """A model as transformers holds it, its directory written beside."""
    meant = layouts.write(directory, layouts.tiny(architecture, tie_word_embeddings=False), layout, **changes)
    return held(directory, meant, kind)


def same_weights(one, other):
    pairs = list(zip(one.named_parameters(), other.named_parameters(), strict=True))
    return all(a[0] == b[0] and a[1].dtype == b[1].dtype and torch.equal(a[1], b[1]) for a, b in pairs)


def decoded(directory):
    """The tokens of the directory, read without transformers."""
    decoder = SelfSpeculativeDecoder.from_pretrained(directory, dtype=torch.float32, **SPECULATION)
    return decoder.generate(PROMPT, 16).new_tokens[0].tolist()


@pytest.fixture(params=HELD)
def case(request, tmp_path):
    layout, kind = HELD[request.param]
    return tmp_path / "model", made(tmp_path / "model", layout, kind)


class TestRead:
    def test_the_weights_of_its_files(self, case):
        directory, model = case
        adapted = adapt(model)
        assert same_weights(adapted, load(directory, torch.float32)[0])
        for own, theirs in (
            (adapted.embedding, model.model.embed_tokens.weight),
            (adapted.head.head_weight, model.lm_head.weight),
        ):
            assert own is theirs
        assert adapted.decoder.layer(1).attn_norm is model.model.layers[1].input_layernorm.weight

    def test_the_tokens_of_its_files(self, case):
        directory, model = case
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert generated(model, PROMPT, **OURS) == decoded(directory)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(
            torch.equal(tensor.view(-1).view(torch.uint8), after[name].view(-1).view(torch.uint8))
            for name, tensor in before.items()
        )

    @pytest.mark.parametrize(("architecture", "changes"), [("qwen2", {}), ("llama3", {"head_dim": 32})])
    def test_ties_and_biases(self, tmp_path, architecture, changes):
        meant = layouts.write(
            tmp_path / "m", layouts.tiny(architecture, **changes), layouts.compressed("pack-quantized", 8, 32)
        )
        model = held(tmp_path / "m", meant, "compressed")
        assert same_weights(adapt(model), load(tmp_path / "m", torch.float32)[0])
        assert generated(model, PROMPT, **OURS) == decoded(tmp_path / "m")

    def test_zero_points_that_gptqmodel_has_converted(self, tmp_path):
        """The configuration still says "gptq"."""
        model = held_models.second_convention(made(tmp_path / "m", layouts.gptq(4, 32, False), TORCH))
        assert same_weights(adapt(model), load(tmp_path / "m", torch.float32)[0])

    def test_goes_on_when_the_model_goes(self, tmp_path):
        model = made(tmp_path / "m")
        decoder = SelfSpeculativeDecoder(adapt(model), 2)
        for module in model.modules():
            for name in ("weight_packed", "weight_scale"):
                module._parameters.pop(name, None)
        del model
        assert decoder.generate(PROMPT, 16).new_tokens[0].tolist() == decoded(tmp_path / "m")

    def test_gathering_would_move_copies(self, tmp_path):
        model = made(tmp_path / "m")
        with pytest.raises(UnsupportedModelError, match=r"another library holds quantized .*layerskip\.adapt\(model\)"):
            gather_weights(model)
        adapted = adapt(model)
        assert gather_weights(adapted).size > 0
        assert SelfSpeculativeDecoder(adapted, 2).generate(PROMPT, 16).new_tokens[0].tolist() == decoded(tmp_path / "m")


class TestFollows:
    def test_values_that_change_in_place(self, tmp_path):
        """They are packed into other memory, so nothing would see it."""
        model = made(tmp_path / "m", layouts.gptq(4, 32, True), TORCH)
        before = generated(model, PROMPT, **OURS)
        for module in model.modules():
            if hasattr(module, "scales"):
                module.scales[:, ::2] *= -1
        after = generated(model, PROMPT, **OURS)
        assert after == SelfSpeculativeDecoder(adapt(model), 2).generate(PROMPT, 16).new_tokens[0].tolist()
        assert after != before

    def test_what_a_forward_has_decompressed_is_plain(self, tmp_path):
        model = made(tmp_path / "m")
        assert generated(model, PROMPT, **OURS) == decoded(tmp_path / "m")
        held_models.decompress(model)
        adapted = adapt(model)
        assert adapted.weights == "float32"
        assert adapted.decoder.layer(2).down is model.model.layers[2].mlp.down_proj.weight
        assert generated(model, PROMPT, **OURS) == generated(model, PROMPT, max_new_tokens=16)


def repacked(kind):
    """A class that shuffles what it holds, under the same names."""
    return lambda path: made(path, layouts.gptq(4, 32, True), f"gptqmodel.nn_modules.qlinear.{kind}")


def without(name):
    def make(path):
        model = made(path)
        del model.model.layers[1].mlp.up_proj._parameters[name]
        return model

    return make


def of_method(method):
    def make(path):
        model = made(path)
        model.config.quantization_config["quant_method"] = method
        return model

    return make


def untied(path):
    model = made(path)
    model.config.tie_word_embeddings = True
    return model


def on_meta(path):
    model = made(path)
    model.model.norm.to("meta")
    return model


def with_transforms(path):
    """As compressed-tensors turns states by a matrix that is in no weight."""
    model = made(path)
    hook = types.FunctionType(
        (lambda module, args: None).__code__, {"__name__": "compressed_tensors.transform.factory"}
    )
    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(hook)
    return model


REFUSED = {
    "transforms": (with_transforms, r"compressed_tensors\.transform\.factory.*a forward hook of .*1\.mlp\.up_proj"),
    "marlin": (repacked("marlin.MarlinLinear"), r"self_attn\.q_proj of type gptqmodel.*MarlinLinear is not"),
    "exllama": (repacked("exllamav2.ExllamaV2Linear"), r"ExllamaV2Linear is not supported; supported: .*TorchLinear"),
    "act-order": (lambda path: made(path, layouts.gptq(4, 32, True), TORCH, desc_act=True), "desc_act true"),
    "another method": (of_method("hqq"), "a model quantised with hqq is not supported; supported: layerskip"),
    "a layout of another method": (of_method("awq"), r"q_proj of type torch\.nn\.modules\.linear\.Linear|AWQ with"),
    "a scale that is missing": (without("weight_scale"), r"lacks 1 weights .*layers\.1\.mlp\.up_proj\.weight"),
    "values that are missing": (without("weight_packed"), r"the model has no .*\.1\.mlp\.up_proj\.weight_packed"),
    "a head that is not the embedding": (untied, "head and an embedding that are not one parameter"),
    "the meta device": (on_meta, r"model\.norm\.weight is on the meta device"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path, what):
    make, message = REFUSED[what]
    model = make(tmp_path / "m")
    with pytest.raises((UnsupportedModelError, ModelFileError), match=message):
        model.generate(PROMPT, **OURS)


def test_weights_that_are_rounded_at_each_call(tmp_path):
    """As compressed-tensors holds them before they are compressed."""
    model = made(tmp_path / "m")
    held_models.decompress(model)
    model.model.layers[2].mlp.up_proj.quantization_status = "frozen"
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.up_proj has a forward of its own"):
        adapt(model)


class TestAccelerated:
    """The quantized layers stay whose they are; what is plain takes the ops."""

    def test_gives_the_same(self, tmp_path):
        model = made(tmp_path / "m", layouts.awq(32), AWQ)
        classes = [type(module) for module in model.modules()]
        with torch.no_grad():
            expected = model(PROMPT).logits
            found = layerskip.accelerate(model)(PROMPT).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        fused = {type(module).__name__ for module in model.modules()}
        assert {"FusedRMSNorm", "SkinnyLinear", "AwqTorchLinear"} <= fused
        assert "FusedSwiGLU" not in fused
        assert generated(model, PROMPT, **OURS) == decoded(tmp_path / "m")
        assert [type(module) for module in layerskip.restore(model).modules()] == classes

    def test_refuses_what_adapt_refuses(self, tmp_path):
        with pytest.raises(UnsupportedModelError, match="MarlinLinear"):
            layerskip.accelerate(repacked("marlin.MarlinLinear")(tmp_path / "m"))


# Those with zero points transformers 5.24 cannot load with compressed-tensors 0.20.
COMPRESSED = {
    "W4A16": W4A16,
    "W8A16": layouts.compressed("pack-quantized", 8, None),
    "W8A8": layouts.compressed("int-quantized", 8, None),
    "FP8 per output": layouts.float8("channel"),
    "FP8 in blocks": layouts.float8("block"),
}


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
class TestCompressedTensors:
    """With the package itself."""

    @pytest.fixture(params=COMPRESSED)
    def case(self, request, tmp_path):
        layout = COMPRESSED[request.param]
        settings = {**layout.settings, "quantization_status": "compressed", "ignore": ["lm_head"]}
        if request.param == "W8A8":
            activations = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
            group = {**settings["config_groups"]["group_0"], "input_activations": activations}
            settings["config_groups"] = {"group_0": group}
        layouts.write(tmp_path / "m", layouts.tiny(), layout._replace(settings=settings))
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", **options)
        assert not any(info.values()), info
        return tmp_path / "m", model

    def test_reads_what_it_holds(self, case):
        directory, model = case
        assert same_weights(adapt(model), load(directory, torch.float32)[0])
        assert generated(model, PROMPT, **OURS) == decoded(directory)

    def test_follows_what_it_decompresses(self, case):
        directory, model = case
        generated(model, PROMPT, **OURS)
        with torch.no_grad():
            model(PROMPT)
        assert generated(model, PROMPT, **OURS) == generated(
            dequantized(load(directory, torch.float32)[0]), PROMPT, max_new_tokens=16
        )
        assert adapt(model).weights == "float32"

    def test_dequantized_as_it_loads(self, case):
        directory, _ = case
        config = transformers.CompressedTensorsConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, quantization_config=config
        )
        assert adapt(model).weights == "float32"
        assert generated(model, PROMPT, **OURS) == generated(model, PROMPT, max_new_tokens=16)
