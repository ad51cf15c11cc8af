"""The file of an exit, and what becomes of it on a model."""

from __future__ import annotations

import pytest
import torch
from exits_of import random_exit
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, VOCABULARY, tiny_model

from layerskip import Exit
from layerskip.models import adapt
from layerskip_kernels.formats import dequantize, kind_of

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ("norm_weight", "token_ids", "head_down", "head_up")


def equal(one, two):
    return one is two is None or (one.dtype == two.dtype and torch.equal(one, two))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_draft_layers", [0, 1, 2])
@pytest.mark.parametrize(("token_ids", "rank"), [(None, 0), ([3, 5, 70], 4)])
def test_what_is_saved_is_read(tmp_path, architecture, num_draft_layers, token_ids, rank):
    before = random_exit(adapt(tiny_model(architecture, torch.bfloat16)), 3, num_draft_layers, token_ids, rank)
    assert before.save(tmp_path) == tmp_path / "exit.safetensors"
    after = Exit.load(tmp_path)
    assert [after.exit_layer, after.num_layers, after.vocab_size, after.num_draft_layers] == [
        *(3, 4, VOCABULARY, num_draft_layers)
    ]
    assert all(equal(getattr(before, part), getattr(after, part)) for part in PARTS)
    pairs = zip(before.draft_layers, after.draft_layers, strict=True)
    assert all(equal(one, two) for mine, theirs in pairs for one, two in zip(mine, theirs, strict=True))


def test_it_is_one_file_in_a_directory_that_need_not_be_there(tmp_path):
    exit_ = random_exit(adapt(tiny_model()))
    assert exit_.save(tmp_path / "new") == tmp_path / "new" / "exit.safetensors"
    assert exit_.save(tmp_path / "mine.safetensors") == tmp_path / "mine.safetensors"
    assert (
        Exit.load(tmp_path / "mine.safetensors").num_draft_layers == Exit.load(tmp_path / "new").num_draft_layers == 1
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["exit.safetensors"], "no temporary file is left"


def test_shared_weights_are_saved(tmp_path):
    model = adapt(tiny_model())
    layer = model.decoder.layer(1)
    Exit(1, model.head.norm_weight, 4, VOCABULARY, [layer, layer]).save(tmp_path)
    assert torch.equal(Exit.load(tmp_path).draft_layers[1].down, layer.down)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    exit_ = random_exit(adapt(tiny_model()))
    path = exit_.save(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        random_exit(adapt(tiny_model()), num_draft_layers=2).save(tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_on_a_model_it_shares_what_needs_no_cast():
    model = adapt(tiny_model())
    exit_ = random_exit(model, 2, 2)
    bound = exit_.of(model)
    assert (bound.exit_layer, len(bound.draft_layers), bound.head.eps) == (2, 2, model.head.eps)
    assert bound.head.head_weight.data_ptr() == model.head.head_weight.data_ptr()
    assert bound.head.norm_weight.data_ptr() == exit_.norm_weight.data_ptr()
    assert bound.draft_layers[1].down.data_ptr() == exit_.draft_layers[1].down.data_ptr()
    cast = exit_.of(adapt(tiny_model(dtype=torch.bfloat16)))
    assert {weight.dtype for layer in cast.draft_layers for weight in layer if weight is not None} == {torch.bfloat16}
    assert cast.head.norm_weight.dtype == torch.bfloat16
    assert torch.equal(cast.draft_layers[0].q, exit_.draft_layers[0].q.bfloat16())


def test_its_head_has_its_rows_and_its_correction():
    model = adapt(tiny_model())
    exit_ = random_exit(model, token_ids=[3, 5, 70], rank=4)
    whole = model.head.head_weight + exit_.head_up @ exit_.head_down
    full, reduced, int8 = exit_.of(model, "full").head, exit_.of(model).head, exit_.of(model, "int8").head
    torch.testing.assert_close(full.head_weight, whole)
    assert reduced.token_map.tolist() == [3, 5, 70]
    assert exit_.of(model, torch.tensor([1, 2])).head.token_map.tolist() == [1, 2]
    for head, rows in ((reduced, whole[[3, 5, 70]]), (int8, whole)):
        assert head.head_weight.dtype == torch.int8
        error = (head.head_weight.float() * head.scale[:, None] - rows).abs()
        assert (error <= rows.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
    with pytest.raises(ValueError, match="rows must be 'full', 'int8' or token ids, got 'int4'"):
        exit_.of(model, "int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draft_layers_are_in_int8_where_their_head_is(dtype):
    """But for what has a width of 72, which is no multiple of a group."""
    model = adapt(tiny_model(dtype=dtype))
    exit_ = random_exit(model, 2, 2, token_ids=[3, 5, 70])
    for rows in (None, "int8", torch.tensor([1, 2])):
        for layer, plain in zip(exit_.of(model, rows).draft_layers, exit_.draft_layers, strict=True):
            for name, weight in layer._asdict().items():
                if name in ("q", "k", "v", "o", "gate", "up"):
                    assert kind_of(weight, 32) == "integers"
                    lost = dequantize(weight, 32) - getattr(plain, name).to(dtype).float()
                    assert 0 < lost.norm() < 0.01 * getattr(plain, name).norm()
                else:
                    assert equal(weight, None if weight is None else getattr(plain, name).to(dtype))
    assert all(
        equal(one.q, two.q.to(dtype))
        for one, two in zip(exit_.of(model, "full").draft_layers, exit_.draft_layers, strict=True)
    )


def test_an_exit_of_another_model_is_refused():
    model = adapt(tiny_model())
    norm = model.head.norm_weight
    with pytest.raises(ValueError, match="a model of 5 layers, this one has 4"):
        Exit(2, norm, 5, VOCABULARY).of(model)
    with pytest.raises(ValueError, match=f"a model of 64 tokens, this one has {VOCABULARY}"):
        Exit(2, norm, 4, 64).of(model)
    with pytest.raises(ValueError, match="a model of 48 values a state, this one has 32"):
        Exit(2, torch.ones(48), 4, VOCABULARY).of(model)
    layer = random_exit(model).draft_layers[0]
    biased = layer._replace(q_bias=torch.ones(32))
    with pytest.raises(ValueError, match=r"draft layer 0 .*: q_bias has shape \[32\], that of the model's layers none"):
        Exit(2, norm, 4, VOCABULARY, [biased]).of(model)
    qwen2 = adapt(tiny_model("qwen2"))
    plain = random_exit(qwen2).draft_layers[0]._replace(q_bias=None)
    with pytest.raises(ValueError, match=r"draft layer 0 .*: q_bias has shape none, that of the model's layers \[32\]"):
        Exit(2, norm, 4, VOCABULARY, [plain]).of(qwen2)
    thin = layer._replace(gate=layer.gate[:8], up=layer.up[:8], down=layer.down[:, :8])
    with pytest.raises(
        ValueError, match=r"draft layer 1 .*: gate has shape \[8, 32\], that of the model's layers \[72, 32\]"
    ):
        Exit(2, norm, 4, VOCABULARY, [layer, thin]).of(model)


def test_bad_values_are_named():
    norm = torch.ones(32)
    for layer in (0, 4):
        with pytest.raises(ValueError, match=f"exit_layer must be in 1 … 3 for 4 layers, got {layer}"):
            Exit(layer, norm, 4, VOCABULARY)
    with pytest.raises(ValueError, match="token_ids must be sorted"):
        Exit(2, norm, 4, VOCABULARY, token_ids=torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=f"token id {VOCABULARY} is outside"):
        Exit(2, norm, 4, VOCABULARY, token_ids=torch.tensor([VOCABULARY]))
    with pytest.raises(ValueError, match=r"norm_weight is torch.int64 \[32\], expected floats"):
        Exit(2, norm.long(), 4, VOCABULARY)
    with pytest.raises(ValueError, match=r"shapes \[4, 32\] and None"):
        Exit(2, norm, 4, VOCABULARY, head_down=torch.ones(4, 32))
    with pytest.raises(ValueError, match=rf"shapes \[4, 32\] and \[{VOCABULARY}, 3\], expected \[r, 32\]"):
        Exit(2, norm, 4, VOCABULARY, head_down=torch.ones(4, 32), head_up=torch.ones(VOCABULARY, 3))


def damaged(path, **changes):
    """Write the file again, with other metadata and without the tensors that are None."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **{name: value for name, value in changes.items() if isinstance(value, str)}}
    tensors = {name: tensor for name, tensor in load_file(path).items() if changes.get(name, "") is not None}
    tensors |= {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "2"}, "format '2', this version reads '1'"),
        ({"exit_layer": "4"}, "exit_layer must be in 1 … 3"),
        ({"num_layers": "many"}, "num_layers is 'many', expected an integer"),
        *(
            ({name: value}, f"{name} is .*, expected an integer in 0")
            for value in ("-1", "1e3", "9" * 30, "٣", "", "1.5")
            for name in ("exit_layer", "num_layers", "vocab_size", "num_blocks")
        ),
        ({"num_blocks": "999999999"}, r"num_blocks is 999999999, there are blocks \[0\]"),
        ({"token_ids": torch.ones(3)}, r"token_ids must be a non-empty int64 vector, got torch.float32 \[3\]"),
        ({"\x1b[31m": torch.ones(1)}, r"unknown tensor \\x1b\[31m"),
        ({"num_blocks": "2"}, r"num_blocks is 2, there are blocks \[0\]"),
        ({"norm_weight": None}, "it has no 'norm_weight'"),
        ({"blocks.0.down": None}, "it has no blocks.0.down"),
        ({"blocks.0.colour": torch.ones(1)}, "unknown tensor blocks.0.colour"),
        ({"colour": torch.ones(1)}, "unknown tensor colour"),
    ],
)
def test_a_file_that_is_no_exit_is_named(tmp_path, changes, message):
    path = random_exit(adapt(tiny_model())).save(tmp_path)
    damaged(path, **changes)
    with pytest.raises(ValueError, match=f"exit.safetensors is not an exit: .*{message}"):
        Exit.load(tmp_path)


def test_a_missing_or_cut_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no exit at .*exit\.safetensors"):
        Exit.load(tmp_path)
    path = random_exit(adapt(tiny_model())).save(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not an exit"):
        Exit.load(path)
