"""`early_exit_loss`: values and gradients against float64, the contract's odd cases, and the registrations."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels import _extension, cpu_loss

from .common import DTYPES, ISAS, running_on

# |error| against float64, relative to the largest entry of the truth: a handful of roundings of the dtype (eps 1e-16,
# 6e-8, 8e-3); 16-bit logits of size ~3 are rounded once, which moves a softmax by up to 3 eps.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BACKENDS = ("cpu", "reference")
SHAPES = [(1, 1, 8, 5), (2, 7, 41, 37), (3, 9, 16, 130), (4, 33, 24, 257)]  # N, R, D, V


def make(exits: int, rows: int, width: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[rows // 2 : rows // 2 + rows // 4] = -100
    return {
        "hiddens": (2 * normal(exits, rows, width)).to(dtype),
        "norm_weight": (1 + 0.1 * normal(width)).to(dtype),
        "head_weight": (normal(vocab_size, width) * width**-0.5).to(dtype),
        "labels": labels,
        "exit_weights": torch.linspace(0.2, 1.0, exits),
    }


def truth(inputs: dict[str, Tensor], eps: float = 1e-5) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, exit losses and gradients by torch's autograd in float64."""
    names = ("hiddens", "norm_weight", "head_weight", "exit_weights")
    leaves = [inputs[name].double().clone().requires_grad_() for name in names]
    hiddens, norm_weight, head_weight, exit_weights = leaves
    normed = F.rms_norm(hiddens, norm_weight.shape, norm_weight, eps)
    exit_losses = torch.stack([F.cross_entropy(one @ head_weight.T, inputs["labels"]) for one in normed])
    loss = (exit_losses * exit_weights).sum()
    return loss, exit_losses, list(torch.autograd.grad(loss, leaves))


def run(inputs: dict[str, Tensor], frozen: tuple[str, ...] = ()) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    names = ("hiddens", "norm_weight", "head_weight", "exit_weights")
    leaves = {name: inputs[name].clone().requires_grad_(name not in frozen) for name in names}
    out = lk.early_exit_loss(**leaves, labels=inputs["labels"])
    out.loss.backward()
    return out.loss, out.exit_losses, {name: leaf.grad for name, leaf in leaves.items()}


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(float(expected.detach().abs().max()), 1e-6)
    error = float((actual.detach().double() - expected.detach()).abs().max()) / scale
    assert error <= TOLERANCES[dtype], f"relative error {error:.2e} in {dtype}"


@pytest.fixture(params=["native passes", "torch's passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch's passes":
        monkeypatch.setattr(_extension, "cpu_reason", "a test goes without it")
    elif _extension.cpu_reason is not None:
        pytest.skip(f"no native kernels: {_extension.cpu_reason}")
    return str(request.param)


@pytest.fixture(params=["one tile", "many tiles"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "many tiles":  # odd sizes, so that the last tile is a short one
        monkeypatch.setattr(cpu_loss, "FORWARD_TILE", (5, 17))
        monkeypatch.setattr(cpu_loss, "STRIP_SIZE", 0)
        monkeypatch.setattr(cpu_loss, "STRIP_TOKENS", 13)
        monkeypatch.setattr(cpu_loss, "NORM_ROWS", 7)
    return str(request.param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_against_float64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, backend: str, tiling: str
) -> None:
    inputs = make(*shape, dtype)
    loss, exit_losses, (hiddens, norm_weight, head_weight, exit_weights) = truth(inputs)
    with lk.use_backend(backend):
        actual_loss, actual_losses, grads = run(inputs)
    assert_near(actual_loss, loss, dtype)
    assert_near(actual_losses, exit_losses, dtype)
    for name, expected in zip(grads, (hiddens, norm_weight, head_weight, exit_weights), strict=True):
        assert_near(grads[name], expected, torch.float32 if name == "exit_weights" and dtype.itemsize == 8 else dtype)


@pytest.mark.parametrize("frozen", [(), ("head_weight",)], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_against_float64(
    isa: str, dtype: torch.dtype, frozen: tuple[str, ...], tiling: str
) -> None:
    inputs = make(4, 33, 24, 257, dtype)
    loss, exit_losses, expected = truth(inputs)
    with running_on(isa):
        actual_loss, actual_losses, grads = run(inputs, frozen)
    assert_near(actual_loss, loss, dtype)
    assert_near(actual_losses, exit_losses, dtype)
    for (name, grad), wanted in zip(grads.items(), expected, strict=True):
        assert (grad is None) == (name in frozen)
        if grad is not None:
            assert_near(grad, wanted, dtype)


# Of one pass, relative to the largest entry: the dtype's rounding of what is stored, and a few of fp32 in exp.
PASS_TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tile(dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """Logits, all negative in one row, some -inf, and labels, some of them outside of the tile [20, 20 + tokens)."""
    generator = torch.Generator().manual_seed(tokens)
    logits = (6 * torch.randn(7, tokens, generator=generator)).to(dtype)
    logits[1] = logits[1].abs().neg() - 30
    logits[2, ::2] = -torch.inf
    logits[2, 0] = 1
    return logits, torch.tensor([20, 20 + tokens - 1, 20 + tokens // 2, 19, 20 + tokens, -100, 20])


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_pass_over_a_tile_against_float64(isa: str, dtype: torch.dtype, tokens: int) -> None:
    logits, labels = tile(dtype, tokens)
    exact = logits.double()
    shift = torch.tensor([-torch.inf, -40, -5, 8, 0, -torch.inf, 3])
    sums, chosen, slope = torch.linspace(0, 3, 7), torch.full((7,), 9.0), torch.ones(7, 19)
    before = shift.clone()
    slack = 10.0 if dtype != torch.float16 else 0.0
    with running_on(isa):
        torch.ops.layerskip_native.loss_terms(logits, labels, 20, slack, shift, sums, chosen, slope)
    top = exact.amax(1)
    assert shift.tolist() == torch.where(top > before + slack, top.float(), before).tolist()
    shrink = (before - shift).double().exp()
    terms = (exact - shift[:, None]).exp()
    error = (logits.double() - terms).abs().amax(1) / terms.amax(1).clamp(min=torch.finfo(dtype).tiny)
    assert float(error.max()) <= PASS_TOLERANCES[dtype]
    torch.testing.assert_close(sums.double(), torch.linspace(0, 3, 7) * shrink + terms.sum(1), rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(slope.double(), shrink[:, None].expand(7, 19), rtol=2e-6, atol=1e-30)
    local = labels - 20
    for row in range(7):
        inside = 0 <= local[row] < tokens
        assert chosen[row] == (exact[row, local[row]] if inside else 9.0)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_slopes_of_a_tile_against_float64(isa: str, dtype: torch.dtype, tokens: int) -> None:
    logits, labels = tile(dtype, tokens)
    logsumexp = logits.float().logsumexp(1) + 0.5  # as if other tiles had as much again
    scale = torch.linspace(0, 1.5, 7)
    expected = (logits.double() - logsumexp.double()[:, None]).exp()
    for row, local in enumerate((labels - 20).tolist()):
        if 0 <= local < tokens:
            expected[row, local] -= 1
    expected *= scale.double()[:, None]
    with running_on(isa):
        torch.ops.layerskip_native.loss_slopes(logits, labels, 20, logsumexp, scale)
    assert float((logits.double() - expected).abs().max()) <= 1.5 * PASS_TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_in_torch_against_float64(dtype: torch.dtype, tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "cpu_reason", "a test goes without it")
    inputs = make(3, 9, 16, 130, dtype)
    loss, exit_losses, expected = truth(inputs)
    actual_loss, actual_losses, grads = run(inputs)
    assert_near(actual_loss, loss, dtype)
    assert_near(actual_losses, exit_losses, dtype)
    for grad, wanted in zip(grads.values(), expected, strict=True):
        assert_near(grad, wanted, dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_logits_reach_the_sum(isa: str) -> None:
    logits, labels = tile(torch.bfloat16, 40)
    logits[3, 21] = torch.nan
    shift, sums, chosen = torch.zeros(7), torch.zeros(7), torch.zeros(7)
    with running_on(isa):
        torch.ops.layerskip_native.loss_terms(logits, labels, 20, 10.0, shift, sums, chosen, None)
    assert sums.isnan().tolist() == [row == 3 for row in range(7)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_frozen_head_gives_the_same_state_gradients(dtype: torch.dtype, backend: str, tiling: str) -> None:
    inputs = make(3, 9, 16, 130, dtype)
    _, _, expected = truth(inputs)
    with lk.use_backend(backend):
        _, _, grads = run(inputs, frozen=("head_weight",))
    assert grads["head_weight"] is None
    assert_near(grads["hiddens"], expected[0], dtype)
    assert_near(grads["norm_weight"], expected[1], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [(), ("head_weight",), ("hiddens",), ("hiddens", "norm_weight")])
def test_gradcheck(frozen: tuple[str, ...], backend: str, tiling: str) -> None:
    inputs = make(2, 4, 3, 19, torch.float64)
    inputs["exit_weights"] = inputs["exit_weights"].double()
    names = ("hiddens", "norm_weight", "head_weight", "exit_weights")
    leaves = [inputs[name].requires_grad_(name not in frozen) for name in names]

    def loss(hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, exit_weights: Tensor) -> Tensor:
        return lk.early_exit_loss(hiddens, norm_weight, head_weight, inputs["labels"], exit_weights).loss

    with lk.use_backend(backend):
        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [("hiddens",), ("norm_weight", "head_weight"), ("exit_weights",)], ids="-".join)
def test_second_derivatives_are_refused(names: tuple[str, ...], backend: str) -> None:
    """Though first ones with create_graph=True are right: without a refusal the second would lack terms."""
    inputs = make(2, 7, 16, 37, torch.float32)
    leaves = [inputs[name].requires_grad_() for name in names]
    with lk.use_backend(backend):
        expected = torch.autograd.grad(lk.early_exit_loss(**inputs).loss, leaves)
        first = torch.autograd.grad(lk.early_exit_loss(**inputs).loss, leaves, create_graph=True)
        for one, other in zip(first, expected, strict=True):
            assert torch.equal(one, other)
            with pytest.raises(NotImplementedError, match="early_exit_loss is differentiable once: it has no second"):
                torch.autograd.grad(one.square().sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_losses_say_that_they_are_detached(backend: str) -> None:
    inputs = make(2, 7, 16, 37, torch.float32)
    with lk.use_backend(backend):
        assert not lk.early_exit_loss(**inputs).exit_losses.requires_grad
        inputs["hiddens"].requires_grad_()
        out = lk.early_exit_loss(**inputs)
    for wrong in (out.exit_losses[0], out.loss + out.exit_losses.sum()):
        with pytest.raises(RuntimeError, match="exit_losses of early_exit_loss are detached; take the gradient of los"):
            wrong.backward(retain_graph=True)
    (out.loss + 0 * out.exit_losses.sum()).backward()
    assert inputs["hiddens"].grad is not None


def test_exit_losses_keep_no_states_alive() -> None:
    inputs = make(2, 7, 16, 37, torch.float32)
    states = inputs["hiddens"].requires_grad_() * 1
    out = lk.early_exit_loss(**{**inputs, "hiddens": states})
    losses, alive = out.exit_losses, weakref.ref(states)
    del states, out
    assert losses.isfinite().all()
    assert alive() is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("narrow", [("hiddens",), ("hiddens", "head_weight")], ids="-".join)
def test_autocast_casts_mixed_dtypes(narrow: tuple[str, ...], backend: str) -> None:
    """bf16 states, as autocast's matmuls give them, and an fp32 norm; without autocast it is an error."""
    inputs = make(2, 7, 16, 37, torch.bfloat16)
    mixed = {
        name: value.float() if name in ("norm_weight", "head_weight") and name not in narrow else value
        for name, value in inputs.items()
    }
    with lk.use_backend(backend):
        expected_loss, _, expected = run(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, grads = run(mixed)
        with pytest.raises(TypeError, match="norm_weight has dtype float32, expected bfloat16"):
            run(mixed)
    assert torch.equal(loss, expected_loss)
    for name, grad in grads.items():
        assert grad.dtype == mixed[name].dtype
        assert torch.equal(grad, expected[name].to(grad.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_that_of_torch_in_the_same_dtype(backend: str) -> None:
    inputs = make(2, 64, 64, 1000, torch.bfloat16)
    _, expected, _ = truth(inputs)
    normed = F.rms_norm(inputs["hiddens"], inputs["norm_weight"].shape, inputs["norm_weight"], 1e-5)
    logits = [(x @ inputs["head_weight"].T).float() for x in normed]
    torch_losses = torch.stack([F.cross_entropy(one, inputs["labels"]) for one in logits])
    with lk.use_backend(backend):
        actual = lk.early_exit_loss(**inputs).exit_losses
    torch_error = (torch_losses.double() - expected).abs().max()
    assert (actual.double() - expected).abs().max() <= torch_error + 1e-3  # one rounding of a logit, averaged


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_label_gets_no_gradient_and_no_labels_give_zero(backend: str) -> None:
    inputs = make(2, 8, 16, 50, torch.float32)
    with lk.use_backend(backend):
        _, _, grads = run(inputs)
        assert not grads["hiddens"][:, inputs["labels"] == -100].any()
        assert grads["hiddens"][:, inputs["labels"] != -100].any(-1).all()
        inputs["labels"].fill_(-100)
        loss, exit_losses, grads = run(inputs)
    assert loss == 0
    assert not exit_losses.any()
    assert not grads["hiddens"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    with lk.use_backend(backend):
        loss, _, grads = run(make(2, 0, 16, 50, torch.float32))
    assert loss == 0
    assert not grads["head_weight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_states(backend: str) -> None:
    inputs = make(3, 10, 16, 50, torch.float32)
    strided = inputs["hiddens"].transpose(0, 1).contiguous().transpose(0, 1)
    with lk.use_backend(backend):
        expected, actual = run(inputs), run({**inputs, "hiddens": strided})
    assert torch.equal(expected[0], actual[0])
    assert torch.equal(expected[2]["hiddens"], actual[2]["hiddens"])


def test_nan_in_fresh_memory_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(2, 9, 16, 40, torch.bfloat16)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        loss, _, grads = run(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("with_slope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, with_slope: bool) -> None:
    inputs = make(2, 6, 16, 40, dtype)
    for name in ("hiddens", "norm_weight", "head_weight"):
        inputs[name].requires_grad_(name != "head_weight" or not with_slope)
    args = (*inputs.values(), 1e-5, -100, with_slope)
    torch.library.opcheck(torch.ops.layerskip.early_exit_loss.default, args, rtol=2e-2, atol=2e-2)
    logsumexp, slope = torch.ops.layerskip.early_exit_loss(*args)[2:]
    backward = (torch.ones(()), *(x.detach() for x in inputs.values()), logsumexp.detach(), slope.detach())
    torch.library.opcheck(torch.ops.layerskip.early_exit_loss_backward.default, (*backward, 1e-5, -100, not with_slope))


def test_compile_takes_it() -> None:
    inputs = make(2, 6, 16, 40, torch.float32)
    inputs["hiddens"].requires_grad_()
    compiled = torch.compile(lambda: lk.early_exit_loss(**inputs).loss, fullgraph=True, backend="aot_eager")
    compiled().backward()
    actual, inputs["hiddens"].grad = inputs["hiddens"].grad, None
    lk.early_exit_loss(**inputs).loss.backward()
    torch.testing.assert_close(actual, inputs["hiddens"].grad)


def test_no_tensor_of_rows_times_vocabulary_is_made() -> None:
    inputs = make(2, 600, 16, 30_000, torch.float32)
    inputs["hiddens"].requires_grad_()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        lk.early_exit_loss(**inputs).loss.backward()
    largest = max(event.cpu_memory_usage for event in profile.function_events)
    tile = 4 * max(
        cpu_loss.FORWARD_TILE[0] * cpu_loss.FORWARD_TILE[1], cpu_loss.STRIP_SIZE, 2 * 600 * cpu_loss.STRIP_TOKENS
    )
    assert tile < 600 * 30_000
    assert largest <= tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_that_grow_along_the_vocabulary(dtype: torch.dtype, tiling: str, passes: str) -> None:
    """The shift has to move, more than once, and by more than exp could take."""
    inputs = make(1, 6, 8, 100, dtype)
    inputs["head_weight"] = torch.linspace(-60, 60, 100)[:, None].expand(100, 8).to(dtype).contiguous() / 8
    inputs["hiddens"] = inputs["hiddens"].abs()
    loss, _, expected = truth(inputs)
    actual, _, grads = run(inputs, frozen=("head_weight",))
    assert_near(actual, loss, dtype)
    assert_near(grads["hiddens"], expected[0], dtype)


WRONG = {
    "a label past the vocabulary": ({"labels": torch.tensor([0, 50, 1])}, ValueError, r"labels\[1\] is 50"),
    "a negative label": ({"labels": torch.tensor([0, 1, -3])}, ValueError, r"labels\[2\] is -3"),
    "labels of another length": ({"labels": torch.zeros(4, dtype=torch.long)}, ValueError, r"labels has shape \[4\]"),
    "labels in int32": ({"labels": torch.zeros(3, dtype=torch.int32)}, TypeError, "labels has dtype int32"),
    "weights of another length": ({"exit_weights": torch.ones(3)}, ValueError, r"exit_weights has shape \[3\]"),
    "a head of another dtype": (
        {"head_weight": torch.zeros(50, 16).half()},
        TypeError,
        "head_weight has dtype float16",
    ),
    "a head of another width": ({"head_weight": torch.zeros(50, 8)}, ValueError, r"head_weight has shape \[50, 8\]"),
    "a strided head": ({"head_weight": torch.zeros(16, 50).T}, ValueError, "head_weight must be contiguous"),
    "states of rank 2": ({"hiddens": torch.zeros(3, 16)}, ValueError, r"hiddens has shape \[3, 16\]"),
    "no exit": ({"hiddens": torch.zeros(0, 3, 16)}, ValueError, "hiddens has no exit"),
    "a negative eps": ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
    "a token as ignore_index": ({"ignore_index": 3}, ValueError, "ignore_index must be negative"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    change, error, message = WRONG[case]
    inputs = make(2, 3, 16, 50, torch.float32)
    with pytest.raises(error, match=message):
        lk.early_exit_loss(**{**inputs, **change})
