"""What PyTorch's machinery needs of the ops: honest schemas, fakes, autograd, and whole-graph compilation."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import layerskip_kernels as lk
from layerskip_kernels import _extension
from layerskip_kernels.functional import exit_head

from .common import DTYPES, assert_same_bits, run
from .examples import CALLS, EPS, MUTATES, example

DIFFERENTIABLE = ("rms_norm", "linear", "swiglu")


def differentiable(args: dict[str, Any]) -> list[Any]:
    return [
        arg.requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args.values()
    ]


@pytest.fixture(autouse=True)
def tracing_without_poison() -> None:
    """Poison adds its own `fill_` to what is traced."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("op", "options"), CALLS)
def test_opcheck(op: str, options: bool) -> None:
    """On the schema (what is written, what aliases), the fake against the real thing, autograd, and AOT dispatch."""
    torch.library.opcheck(getattr(torch.ops.layerskip, op).default, tuple(example(op, options=options).values()))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_opcheck_with_gradients(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.layerskip, op).default, tuple(differentiable(example(op))))


@pytest.mark.skipif(_extension.cpu_reason is not None, reason=f"no native kernels: {_extension.cpu_reason}")
@pytest.mark.parametrize(("op", "options"), CALLS)
def test_opcheck_of_the_native_library(op: str, options: bool) -> None:
    args = tuple(example(op, options=options).values())
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.layerskip_native, op).default, args, test_utils=checks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "options"), CALLS)
def test_fake_has_the_shape_dtype_and_strides_of_the_result(op: str, options: bool, dtype: torch.dtype) -> None:
    given = example(op, dtype, options)
    args = [_transposed(arg) if name in ("x", "q", "hidden") else arg for name, arg in given.items()]
    real = run(op, *args)
    fake = getattr(torch.ops.layerskip, op)(*[_meta(arg) for arg in args])
    pairs = [(real, fake)] if isinstance(real, Tensor) else zip(real, fake, strict=True)
    for one, other in pairs:
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def _transposed(arg: Tensor) -> Tensor:
    return arg.transpose(0, 1).contiguous().transpose(0, 1)


def _meta(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_meta(one) for one in arg]
    return arg.to("meta") if isinstance(arg, Tensor) else arg


def compiled_equals_eager(op: str, options: bool, backend: str) -> None:
    eager, traced, before = (example(op, options=options) for _ in range(3))
    expected = run(op, *eager.values())
    actual = torch.compile(partial(run, op), fullgraph=True, backend=backend)(*traced.values())
    assert_same_bits(actual, expected)
    for name in MUTATES.get(op, ()):
        assert_same_bits(traced[name], eager[name])
        assert not torch.equal(traced[name], before[name])
    if "logits" in traced:
        assert_same_bits(traced["logits"], eager["logits"])
        assert not torch.equal(traced["logits"], before["logits"])


@pytest.mark.parametrize(("op", "options"), CALLS)
def test_compiles_as_one_graph(op: str, options: bool) -> None:
    torch._dynamo.reset()
    compiled_equals_eager(op, options, "aot_eager")


def step(args: dict[str, Any], norm: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """A decoding step as a user would compile it: ops between torch's own, state updated in place."""
    hidden = run("partial_forward", *args.values())
    out = exit_head(hidden.flatten(0, 1) * 2, norm, head, EPS)
    accepted = lk.accept_greedy(out.token.view(2, 3)[:, :2], out.token.view(2, 3), args["seq_lens"])
    return out.logsumexp + 1, accepted.next_token


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_step_compiles_as_one_graph(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor compiles C++ and there is no g++")
    torch._dynamo.reset()
    eager, traced = example("partial_forward"), example("partial_forward")
    norm, head = torch.ones(32), torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    expected = step(eager, norm, head)
    actual = torch.compile(step, fullgraph=True, backend=backend)(traced, norm, head)
    torch.testing.assert_close(actual, expected)
    for name in ("k_cache", "v_cache", "seq_lens"):
        assert_same_bits(traced[name], eager[name])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_through_a_compiled_graph(op: str) -> None:
    torch._dynamo.reset()
    args = differentiable(example(op))
    leaves = [arg for arg in args if isinstance(arg, Tensor)]
    expected = torch.autograd.grad(run(op, *args).square().sum(), leaves)
    compiled = torch.compile(partial(run, op), fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*args).square().sum(), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


EAGER = {
    "rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    "linear": lambda x, weight, bias, residual: F.linear(x, weight, bias) + residual,
    "swiglu": lambda x, gate, up: F.silu(x @ gate.T) * (x @ up.T),
}


@pytest.mark.parametrize("op", EAGER)
def test_second_derivatives_are_those_of_torch(op: str) -> None:
    values = example(op)
    eps = [values.pop("eps")] if "eps" in values else []
    seconds = []
    for function in (lambda *args: getattr(lk, op)(*args, *eps), EAGER[op]):
        leaves = [tensor.clone().requires_grad_() for tensor in values.values()]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
    for actual, expected in zip(*seconds, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("op", "options"), CALLS)
def test_autocast_changes_no_bits(op: str, options: bool, backend: str) -> None:
    with lk.use_backend(backend):
        expected = run(op, *example(op, options=options).values())
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(run(op, *example(op, options=options).values()), expected)


TRANSFORMS = {
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "hessian": lambda function, x: torch.func.hessian(lambda x: function(x).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", [*EAGER, "early_exit_loss"])
def test_transforms_of_functions_are_refused(op: str, transform: str) -> None:
    """By name; a tangent would be zero, or the error one of torch's inside."""
    loss_args = (torch.randn(2, 5, 8), torch.ones(8), torch.randn(11, 8), torch.arange(5), torch.ones(2))
    x, *rest = loss_args if op == "early_exit_loss" else example(op).values()

    def function(x: Tensor) -> Tensor:
        out = getattr(lk, op)(x, *rest)
        return out if isinstance(out, Tensor) else out.loss

    with pytest.raises(NotImplementedError, match=f"{op} supports neither the derivatives of torch.func nor forward"):
        TRANSFORMS[transform](function, x)
    with torch.no_grad():
        assert torch.func.vmap(lambda _: function(x))(torch.ones(2)).isfinite().all()


def test_forward_mode_is_refused() -> None:
    x, *rest = example("exit_head").values()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="exit_head supports neither"):
        lk.exit_head(forward_ad.make_dual(x, x), *rest)
