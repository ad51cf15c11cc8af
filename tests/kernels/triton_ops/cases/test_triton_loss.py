"""early_exit_loss: values and gradients against torch's autograd in float64, over one tile and over many."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_cases import normal

import layerskip_kernels as lk

# |error| relative to the truth's largest entry: a handful of roundings of the dtype, 6e-8, 5e-4, 4e-3 (in the
# interpreter a bf16 rounding may fall on the neighbour: 8e-3); the slopes are rounded once, the states once.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LEAVES = ("hiddens", "norm_weight", "head_weight", "exit_weights")


def make(exits: int, rows: int, width: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> dict:
    labels = torch.randint(0, vocab_size, (rows,), generator=torch.Generator().manual_seed(4))
    labels[rows // 2 : rows // 2 + rows // 4] = -100
    return {
        "hiddens": normal(0, exits, rows, width, dtype=dtype, device=device, by=2.0),
        "norm_weight": normal(1, width, dtype=dtype, device=device),
        "head_weight": normal(2, vocab_size, width, dtype=dtype, device=device, by=width**-0.5),
        "labels": labels.to(device),
        "exit_weights": torch.linspace(0.2, 1.0, exits, device=device),
    }


def truth(inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [inputs[name].double().requires_grad_() for name in LEAVES]
    normed = F.rms_norm(leaves[0], leaves[1].shape, leaves[1], 1e-5)
    losses = torch.stack([F.cross_entropy(one @ leaves[2].T, inputs["labels"]) for one in normed])
    loss = (losses * leaves[3]).sum()
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def run(inputs: dict[str, Tensor], frozen: tuple[str, ...] = ()) -> tuple[lk.EarlyExitLossOutput, list[Tensor | None]]:
    leaves = {name: inputs[name].clone().requires_grad_(name not in frozen) for name in LEAVES}
    with lk.use_backend("triton"):
        out = lk.early_exit_loss(**leaves, labels=inputs["labels"])
        out.loss.backward()
    return out, [leaf.grad for leaf in leaves.values()]


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = float((actual.double() - expected).abs().max()) / float(expected.abs().max())
    assert error <= TOLERANCES[dtype], f"relative error {error:.1e}"


@pytest.fixture(params=["one tile", "many tiles"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        module = import_module("layerskip_kernels.triton.early_exit_loss")
        for name, value in (("ROWS_AT_ONCE", 16), ("VOCABULARY_AT_ONCE", 100), ("GROUP", 2), ("PROGRAMS", 3)):
            monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (1, 1, 8, 5)),
        (torch.float32, (2, 7, 41, 37)),
        (torch.float32, (3, 17, 24, 257)),
        (torch.float16, (3, 17, 41, 130)),
        (torch.bfloat16, (3, 17, 41, 130)),
    ],
)
@pytest.mark.parametrize("frozen", [(), ("head_weight",), ("hiddens", "norm_weight")])
def test_values_and_gradients(
    frozen: tuple[str, ...], shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make(*shape, dtype, device)
    loss, grads = truth(inputs)
    out, actual = run(inputs, frozen)
    near(out.loss, loss, dtype)
    for name, mine, true in zip(LEAVES, actual, grads, strict=True):
        assert (mine is None) == (name in frozen)
        if mine is not None:
            near(mine, true, dtype)


def test_small_gradients_survive_fp16(device: torch.device) -> None:
    """A mean over many labels: each row's share is below what fp16 holds until it is multiplied out."""
    inputs = make(1, 64, 16, 40, torch.float16, device)
    inputs["exit_weights"] = inputs["exit_weights"] * 1e-6
    _, grads = truth(inputs)
    leaves = {name: inputs[name].clone().requires_grad_() for name in LEAVES}
    with lk.use_backend("triton"):
        (lk.early_exit_loss(**leaves, labels=inputs["labels"]).loss * 1e6).backward()
    near(leaves["head_weight"].grad, grads[2] * 1e6, torch.float16)
    near(leaves["hiddens"].grad, grads[0] * 1e6, torch.float16)


def test_no_labels_no_rows(device: torch.device) -> None:
    inputs = make(2, 5, 8, 11, torch.float32, device)
    inputs["labels"].fill_(-100)
    out, grads = run(inputs)
    assert float(out.loss) == 0.0
    assert all(not grad.any() for grad in grads)
    empty = {**inputs, "hiddens": inputs["hiddens"][:, :0], "labels": inputs["labels"][:0]}
    out, grads = run(empty)
    assert float(out.loss) == 0.0
    assert not grads[2].any()


def test_a_label_that_names_no_token(device: torch.device) -> None:
    """Raises on the CPU; on a GPU, where that would be a host sync, the loss is NaN."""
    inputs = make(2, 5, 8, 11, torch.float32, device)
    inputs["labels"][1] = 11
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"labels\[1\] is 11, expected \[0, 11\)"):
            run(inputs)
    else:
        assert run(inputs)[0].loss.isnan()


def test_second_derivatives_are_refused(device: torch.device) -> None:
    inputs = make(2, 5, 8, 11, torch.float32, device)
    states = inputs["hiddens"].requires_grad_()
    with lk.use_backend("triton"):
        out = lk.early_exit_loss(**inputs)
        (expected,) = torch.autograd.grad(out.loss, states, retain_graph=True)
        (first,) = torch.autograd.grad(out.loss, states, create_graph=True)
    assert torch.equal(first, expected)
    with pytest.raises(NotImplementedError, match="early_exit_loss is differentiable once: it has no second"):
        torch.autograd.grad(first.square().sum(), states)


def test_a_state_that_is_not_finite_shows_in_the_gradients(device: torch.device) -> None:
    inputs = make(2, 20, 16, 100, torch.float32, device)
    inputs["hiddens"][0, 7, 3] = float("nan")
    _, grads = run(inputs)
    assert grads[0][0, 7].isnan().all()
    assert grads[2].isnan().all()
