"""Checkpoints of quantized weights, read packed: their values, refusals, and memory use."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import quantized_checkpoints as layouts
import torch
import transformers
from safetensors.torch import load_file, save_file

import layerskip
from layerskip.models import LayerSkipModel, ModelFileError, UnsupportedModelError, load
from layerskip.models.adaptation import dequantized
from layerskip.models.checkpoints.base import TensorFiles
from layerskip.models.checkpoints.hf import packed_floats

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = torch.tensor([[3, 7, 12, 5, 40, 9]])

# Each layout, the formats that it becomes, and how far what is read may be from what is meant: fp16 keeps 11 bits of a
# scale, and 11 of scale · zero point, which is up to 15 times a scale.
LAYOUTS = {
    "gptq 4 bits": (layouts.gptq(4, 128, True), "int4_g128", 0),
    "gptq 4 bits, groups of 32": (layouts.gptq(4, 32, True), "int4", 0),
    "gptq 4 bits, groups of 64": (layouts.gptq(4, 64, True), "int4", 0),
    "gptq 4 bits, per output": (layouts.gptq(4, -1, True), "int4_g128", 0),
    "gptq 4 bits, zero points": (layouts.gptq(4, 128, False), "int4_zero_g128", 2e-3),
    "gptq v2": (layouts.gptq(4, 32, False, "gptq_v2"), "int4_zero", 2e-3),
    "gptq v2 symmetric": (layouts.gptq(4, 32, True, "gptq_v2"), "int4", 0),
    "gptq that keeps 8 for 8": (layouts.gptq(4, 32, True, "gptq", stored_less=0), "int4", 0),
    "gptq 8 bits": (layouts.gptq(8, 128, True), "int8_g128", 0),
    "gptq 8 bits, groups of 32": (layouts.gptq(8, 32, True), "int8", 0),
    "awq": (layouts.awq(128), "int4_zero_g128", 2e-3),
    "awq, groups of 32": (layouts.awq(32), "int4_zero", 2e-3),
    "W4A16": (layouts.compressed("pack-quantized", 4, 128), "int4_g128", 0),
    "W4A16, groups of 32": (layouts.compressed("pack-quantized", 4, 32), "int4", 0),
    "W4A16 with zero points": (layouts.compressed("pack-quantized", 4, 32, symmetric=False), "int4_zero", 2e-3),
    "W8A16": (layouts.compressed("pack-quantized", 8, None), "int8_g128", 0),
    "W8A16 in bytes": (layouts.compressed("int-quantized", 8, None), "int8_g128", 0),
    "FP8 per output": (layouts.float8("channel"), "fp8_g128", 1e-6),
    "FP8 per tensor": (layouts.float8("tensor"), "fp8_g128", 1e-6),
    "FP8 in blocks": (layouts.float8("block"), "fp8_g128", 1e-6),
    "transformers' fp8": (layouts.fine_grained(), "fp8_g128", 1e-6),
}


@pytest.fixture(params=LAYOUTS)
def case(request, tmp_path):
    layout, form, tolerance = LAYOUTS[request.param]
    meant = layouts.write(tmp_path / "model", layouts.tiny(), layout)
    return tmp_path / "model", meant, form, tolerance


class TestRead:
    def test_means_what_it_says(self, case):
        directory, meant, form, tolerance = case
        model, tokenizer = load(directory, torch.float32)
        assert isinstance(model, LayerSkipModel)
        assert model.weights == f"float32+{form}"
        assert not model.training
        assert tokenizer("w3").input_ids == [3]
        read, expected = dequantized(model).state_dict(), meant.state_dict()
        assert read.keys() == expected.keys()
        for name, weight in expected.items():
            assert (read[name] - weight).abs().max() <= tolerance * weight.abs().max(), name

    def test_writes_what_transformers_would(self, case):
        directory, meant, _, tolerance = case
        decoder = layerskip.SelfSpeculativeDecoder.from_pretrained(directory, dtype=torch.float32, exit_layer=2)
        logits = []

        def keep(history, scores):
            logits.append(scores.clone())
            return scores

        decoder.generate(PROMPT, 1, logits_processor=keep)
        with torch.no_grad():
            expected = meant(PROMPT).logits[0, -1]
        assert (logits[0] - expected).abs().max() <= (1e-4 + 10 * tolerance) * expected.abs().max()

    def test_drafts_and_verifies_losslessly(self, case):
        decoder = layerskip.SelfSpeculativeDecoder.from_pretrained(case[0], exit_layer=2)
        plain = decoder.generate(PROMPT, 24, strategy="autoregressive").new_tokens
        assert torch.equal(decoder.generate(PROMPT, 24).new_tokens, plain)

    @pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama3"])
    def test_biases_norms_ties_and_frequencies(self, tmp_path, architecture):
        changes = {"head_dim": 32} if architecture != "qwen2" else {}
        meant = layouts.write(
            tmp_path / "model", layouts.tiny(architecture, **changes), layouts.compressed("pack-quantized", 8, 32)
        )
        model, _ = load(tmp_path / "model", torch.float32)
        assert model.embedding is model.head.head_weight
        with torch.no_grad():
            expected, found = meant(PROMPT).logits, dequantized(model)(PROMPT).logits
        assert torch.allclose(found, expected, atol=1e-5)
        out = layerskip.SelfSpeculativeDecoder(model, 2).generate(PROMPT, 8).new_tokens
        theirs = meant.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert out.tolist() == theirs[:, PROMPT.shape[1] :].tolist()

    def test_a_group_is_chosen_by_its_targets(self, tmp_path):
        four, eight = layouts.compressed("pack-quantized", 4, 32), layouts.compressed("pack-quantized", 8, 32)

        def write(module, weight):
            return (eight if module.endswith("down_proj") else four).write(module, weight)

        groups = {
            "down": {**eight.settings["config_groups"]["group_0"], "targets": ["re:.*down_proj$"]},
            "others": four.settings["config_groups"]["group_0"],
        }
        layout = layouts.Layout({**four.settings, "config_groups": groups}, write)
        meant = layouts.write(tmp_path / "model", layouts.tiny(), layout)
        model, _ = load(tmp_path / "model", torch.float32)
        assert model.weights == "float32+int4+int8"
        assert torch.equal(
            dequantized(model).model.layers[1].mlp.down_proj.weight, meant.model.layers[1].mlp.down_proj.weight
        )

    def test_sharded(self, tmp_path):
        layouts.write(tmp_path / "model", layouts.tiny(), layouts.awq(32))
        whole, _ = load(tmp_path / "model")
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        (tmp_path / "model" / "model.safetensors").unlink()
        index = {}
        for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
            save_file({name: tensors[name] for name in names}, tmp_path / "model" / f"part-{number}.safetensors")
            index |= dict.fromkeys(names, f"part-{number}.safetensors")
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        parts, _ = load(tmp_path / "model")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))

    def test_from_the_hub(self, tmp_path, monkeypatch):
        """A stand-in for the hub: its files are in a directory."""
        layouts.write(tmp_path / "model", layouts.tiny(), layouts.awq(32))
        for reader in (transformers.AutoConfig, transformers.AutoTokenizer):
            read = reader.from_pretrained

            def here(name, read=read, **options):
                return read(tmp_path / "model" if name == "owner/model" else name, **options)

            monkeypatch.setattr(reader, "from_pretrained", here)
        fetched = []

        def download(name, allow_patterns):
            fetched.append((name, allow_patterns))
            return str(tmp_path / "model")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        model, _ = load("owner/model")
        assert model.weights == "bfloat16+int4_zero"
        assert fetched == [("owner/model", ["*.json", "*.safetensors"])]


GPTQ, AWQ = layouts.gptq(4, 32, False), layouts.awq(32)
WORDS, FLOATS = layouts.compressed("pack-quantized", 4, 32), layouts.float8("channel")


def of_group(layout, **changes):
    group = layout.settings["config_groups"]["group_0"]
    return {"config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


REFUSED = [
    (GPTQ, {"desc_act": True}, r"GPTQ with desc_act true \(act-order\) is not supported; supported: desc_act false"),
    (GPTQ, {"bits": 3}, "GPTQ with bits 3 is not supported; supported: bits 4 and 8"),
    (GPTQ, {"bits": 8}, "GPTQ with bits 8 and sym false"),
    (GPTQ, {"group_size": 16}, "GPTQ with group_size 16 is not supported; supported: 32"),
    (GPTQ, {"checkpoint_format": "marlin"}, "GPTQ with checkpoint_format 'marlin'"),
    (GPTQ, {"dynamic": {"+:.*down.*": {"bits": 8}}}, "settings of single modules"),
    (AWQ, {"version": "gemv"}, "AWQ with version 'gemv' is not supported; supported: gemm"),
    (AWQ, {"bits": 8}, "AWQ with bits 8"),
    (AWQ, {"backend": "llm-awq"}, "AWQ"),
    (WORDS, {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    (WORDS, {"format": "marlin-24"}, "format 'marlin-24'"),
    (WORDS, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity 'sparse-24-bitmask'"),
    (WORDS, {"config_groups": {}}, "without config_groups"),
    (WORDS, {"transform_config": {"config_groups": {"R1": {}}}}, "with transforms"),
    (WORDS, of_group(WORDS, num_bits=2), "pack-quantized with int of 2 bits is not supported; supported: int of 4"),
    (WORDS, of_group(WORDS, actorder="group"), "actorder 'group'"),
    (WORDS, of_group(WORDS, group_size=48), "group_size 48"),
    (WORDS, of_group(WORDS, num_bits=8, symmetric=False), "8-bit weights that are not symmetric"),
    (WORDS, of_group(WORDS, strategy="attn_head"), "strategy 'attn_head'"),
    (FLOATS, of_group(FLOATS, num_bits=4), "float-quantized with float of 4 bits"),
    (layouts.fine_grained(), {"weight_block_size": None}, "fp8 with weight_block_size None"),
    (layouts.fine_grained(), {"fmt": "e5m2"}, "fp8 with fmt 'e5m2'"),
    (FLOATS, {"quant_method": "bitsandbytes"}, "quantised with bitsandbytes is not supported; supported: layerskip"),
]  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(("layout", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
    def test_by_name_before_weights_are_read(self, tmp_path, monkeypatch, layout, changes, message):
        layouts.write(tmp_path / "model", layouts.tiny(), layout, **changes)
        monkeypatch.setattr(TensorFiles, "read", lambda *_: pytest.fail("a weight was read"))
        with pytest.raises(UnsupportedModelError, match=message):
            load(tmp_path / "model")

    def test_what_is_quantized_is_not_quantized_again(self, tmp_path):
        layouts.write(tmp_path / "model", layouts.tiny(), AWQ)
        with pytest.raises(ValueError, match=r"are quantized already \(awq\); leave out int8"):
            load(tmp_path / "model", weights="int8")
        model, _ = load(tmp_path / "model", weights="native")
        with pytest.raises(ValueError, match="packed already"):
            model.quantize("int8")

    def test_weights_that_are_no_format(self, tmp_path):
        with pytest.raises(ValueError, match="unknown weights 'int5', expected one of int8, "):
            load(tmp_path, weights="int5")

    def test_matrices_that_are_multiplied_together_and_differ_in_kind(self, tmp_path):
        def write(module, weight):
            left_out = module.endswith("layers.2.self_attn.k_proj")
            return ({f"{module}.weight": weight}, weight) if left_out else AWQ.write(module, weight)

        layouts.write(tmp_path / "model", layouts.tiny(), layouts.Layout(AWQ.settings, write))
        with pytest.raises(UnsupportedModelError, match="layer 2 with q integers, k plain, v integers is not"):
            load(tmp_path / "model")

    def test_where_transformers_is_needed(self, tmp_path):
        layouts.write(tmp_path / "model", layouts.tiny(), AWQ)
        model, _ = load(tmp_path / "model")
        for use in (layerskip.accelerate, layerskip.adapt):
            with pytest.raises(
                UnsupportedModelError, match=r"a LayerSkipModel \(weights bfloat16\+int4_zero\) was given"
            ):
                use(model)
        with pytest.raises(TypeError, match="transformers model with generate, got LayerSkipModel"):
            layerskip.generate(model, PROMPT)


def change(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


LAYER = "model.layers.1.mlp.up_proj"


class TestDamaged:
    @pytest.mark.parametrize(
        ("layout", "edit", "message"),
        [
            (AWQ, lambda t: t.pop(f"{LAYER}.qweight"), rf"lacks 1 weights .*{LAYER}\.weight"),
            (AWQ, lambda t: t.pop(f"{LAYER}.scales"), rf"the checkpoint has no {LAYER}\.scales"),
            (AWQ, lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:, :9].clone()}),
             r"shape \[4, 9\], its config.json asks for \[\*, 256\]"),
            (GPTQ, lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].float()}), "expected torch.int32"),
            (GPTQ, lambda t: t.update({f"{LAYER}.g_idx": t[f"{LAYER}.g_idx"].flip(0)}), r"g_idx in another order"),
            (GPTQ, lambda t: t[f"{LAYER}.bias"].fill_(1), r"1 weights .* does not use, first .*up_proj\.bias"),
            (AWQ, lambda t: t.update({"model.layers.4.x": torch.ones(1)}), r"does not use, first model\.layers\.4\.x"),
            (AWQ, lambda t: t[f"{LAYER}.scales"].fill_(float("inf")), rf"{LAYER}\.qweight: fp16 cannot hold"),
            (layouts.gptq(4, 32, True), lambda t: t[f"{LAYER}.qzeros"].zero_(), "not the middle of the range"),
        ],
    )  # fmt: skip
    def test_is_named(self, tmp_path, layout, edit, message):
        layouts.write(tmp_path / "model", layouts.tiny(), layout)
        change(tmp_path / "model", edit)
        with pytest.raises((ModelFileError, UnsupportedModelError), match=message):
            load(tmp_path / "model")

    @pytest.mark.parametrize(("layout", "changes"), [(AWQ, {"group_size": 64}), (GPTQ, {"group_size": -1})])
    def test_other_groups_than_the_configuration_says(self, tmp_path, layout, changes):
        layouts.write(tmp_path / "model", layouts.tiny(), layout, **changes)
        size = changes["group_size"] if changes["group_size"] > 0 else 128
        with pytest.raises(ModelFileError, match=rf"4 groups in rows of 128 weights, .* says groups of {size}"):
            load(tmp_path / "model")

    def test_blocks_that_do_not_divide_the_width(self):
        """Two blocks of 128 for 192 weights: of 128 and 64, not of 96 each."""
        values, scale = torch.ones(2, 192).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0]] * 2)
        with pytest.raises(ModelFileError, match=r"w has 2 groups in rows of 192 weights, .* says groups of 128"):
            packed_floats("w", values, scale, 128)

    def test_scales_of_activations_are_not_missed(self, tmp_path):
        layouts.write(tmp_path / "model", layouts.tiny(), FLOATS)
        change(tmp_path / "model", lambda t: t.update({f"{LAYER}.input_scale": torch.ones(1)}))
        assert load(tmp_path / "model")[0].weights == "bfloat16+fp8_g128"
