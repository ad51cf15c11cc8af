"""Weights in one piece of memory: where they lie, and that nothing else about them changes."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from exits_of import random_exit
from tiny import prompt_of, tiny_model

import layerskip
from layerskip.models import weight_arena
from layerskip.models.quantize import MATRICES
from layerskip.models.weight_arena import HUGE, LINE, WeightArena, gather_exit
from layerskip_kernels.formats import is_interleaved, rows_of

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def bits_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def test_weights_lie_in_the_order_of_reading() -> None:
    model = tiny_model()
    adapted = layerskip.adapt(model)
    before, objects = bits_of(model), dict(model.named_parameters())
    memory = layerskip.gather_weights(model)
    assert memory is not None
    layers = [adapted.decoder.layer_parameters(number) for number in range(adapted.num_layers)]
    weights = [layer[name] for layer in layers for name in MATRICES if name in layer]
    weights += [adapted.head.head_weight, adapted.embedding]
    place = memory.address
    assert place % HUGE == 0
    for weight in weights:
        assert weight.data_ptr() == place
        place += -(-weight.nbytes // LINE) * LINE
    small = [one for one in model.parameters() if one.dim() == 1]
    assert sorted(one.data_ptr() for one in small) == [place + i * 128 for i in range(len(small))]  # 32 fp32 numbers
    assert place + 128 * len(small) == memory.address + memory.size
    for name, parameter in model.named_parameters():
        assert parameter is objects[name]
        assert torch.equal(parameter, before[name])


def test_tied_weights_stay_tied_and_have_one_place() -> None:
    model = layerskip.adapt(tiny_model())
    tied = torch.nn.Parameter(model.embedding.detach(), requires_grad=False)  # another parameter of the same memory
    model.head.head_weight = tied
    memory = layerskip.gather_weights(model)
    assert memory is not None
    assert model.embedding.data_ptr() == model.head.head_weight.data_ptr()
    after = model.embedding.data_ptr() + -(-tied.nbytes // LINE) * LINE
    assert after == model.decoder.layer(0).attn_norm.data_ptr()


def test_what_is_decoded_and_saved_stays(tmp_path: Path, one_thread: None) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_model()
    expected = layerskip.SelfSpeculativeDecoder(model, exit_layer=1).generate(prompt_of(7), max_new_tokens=12)
    decoder = layerskip.SelfSpeculativeDecoder(model, exit_layer=1)
    layerskip.gather_weights(model)
    assert torch.equal(decoder.generate(prompt_of(7), max_new_tokens=12).sequences, expected.sequences)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_training_goes_on() -> None:
    model = tiny_model()
    layerskip.gather_weights(model)
    place = model.lm_head.weight.data_ptr()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.lm_head.weight.detach().clone()
    model(prompt_of(5), labels=prompt_of(5)).loss.backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight.data_ptr() == place


def test_scatter_undoes_it() -> None:
    model = tiny_model()
    before = bits_of(model)
    memory = layerskip.gather_weights(model)
    assert memory is not None
    layerskip.scatter_weights(model)
    inside = range(memory.address, memory.address + memory.size)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() not in inside
        assert torch.equal(parameter, before[name])


def test_weights_outlive_the_arena_object() -> None:
    model = tiny_model()
    before = bits_of(model)
    layerskip.gather_weights(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("panels", [False, True])
def test_an_exit_has_an_arena_of_its_own(panels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft layers, then the rows of the head; packed draft layers in panels where these are faster."""
    monkeypatch.setattr(weight_arena, "multiplies_panels", lambda: panels)
    model = layerskip.adapt(helpers.tiny_model("llama2", torch.bfloat16, intermediate_size=96))
    bound = random_exit(model, 1, 2, token_ids=[3, 5, 70]).of(model)
    rows, gathered = bound.head.head_weight.clone(), gather_exit(bound)
    place = gathered.draft_layers[0].q.data_ptr()
    for layer, before in zip(gathered.draft_layers, bound.draft_layers, strict=True):
        for name in (*(name for name in MATRICES if hasattr(layer, name)), "attn_norm", "mlp_norm"):
            weight, same = getattr(layer, name), getattr(before, name)
            assert is_interleaved(weight) == (panels and weight.dim() == 2)
            assert weight.data_ptr() == place
            assert torch.equal(rows_of(weight, 96 if name == "down" else 32), same)
            place += -(-weight.nbytes // LINE) * LINE
    assert gathered.head.head_weight.data_ptr() == place
    assert torch.equal(gathered.head.head_weight, rows)


def test_an_exit_with_the_models_head_leaves_it_in_its_place() -> None:
    model = layerskip.adapt(tiny_model())
    gathered = gather_exit(random_exit(model).of(model))
    assert gathered.head.head_weight.data_ptr() == model.head.head_weight.data_ptr()


def test_what_is_not_in_plain_memory_stays_where_it_is() -> None:
    with torch.inference_mode():
        model = layerskip.adapt(tiny_model())
    place = model.head.head_weight.data_ptr()
    assert layerskip.gather_weights(model) is None
    assert model.head.head_weight.data_ptr() == place


def test_huge_pages() -> None:
    if not SETTING.is_file() or "[never]" in SETTING.read_text():
        pytest.skip("this kernel gives no transparent huge pages")
    memory = WeightArena(3 * HUGE)
    assert memory.huge_bytes() == 0  # nothing is touched yet
    memory.take(torch.ones(3 * HUGE, dtype=torch.uint8))
    if memory.huge_bytes() == 0:
        pytest.skip("no 2 MiB of this machine's memory are free in one piece")
    assert memory.huge_bytes() in (3 * HUGE, 2 * HUGE, HUGE)


def test_where_the_kernel_refuses_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *options: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(weight_arena.mmap, "mmap", Refusing)
    assert torch.equal(WeightArena(HUGE).take(torch.arange(8)), torch.arange(8))


def test_where_the_kernel_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weight_arena, "_SMAPS", tmp_path / "none")
    memory = WeightArena(HUGE)
    memory.take(torch.ones(HUGE, dtype=torch.uint8))
    assert memory.huge_bytes() == 0
