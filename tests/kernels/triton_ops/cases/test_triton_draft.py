"""draft and speculative_round against the ops that they are made of, bit for bit, and against the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import close, on_backend, same_bits

import layerskip_kernels as lk
from tests.kernels import test_draft
from tests.kernels.common import run
from tests.kernels.examples import example, with_draft_layers, with_packed_draft_layers
from tests.kernels.test_speculative_round import composed


def arguments(
    op: str, dtype: torch.dtype, device: torch.device, *, num_draft_layers: int = 0, **given: Any
) -> dict[str, Any]:
    args = {**example(op, dtype), "num_speculations": 2, **given}
    args = with_draft_layers(args, num_draft_layers) if num_draft_layers else args
    for name, value in args.items():
        if isinstance(value, Tensor):
            args[name] = value.to(device)
    return {**args, "weights": [weight.to(device) for weight in args["weights"]]}


def draws(device: torch.device) -> dict[str, Tensor]:
    return {"temperature": torch.tensor([0.8, 0.0], device=device), "seed": torch.tensor([3, 2**40], device=device)}


def positional(args: dict[str, Any], *rest: str) -> list[Any]:
    """In the op's order; what is not given of ``rest`` is None or 0."""
    neutral = {"draft_threshold": 0.0}
    return [args.get(name, neutral.get(name)) for name in (*(name for name in args if name not in rest), *rest)]


DRAFT_REST = ("slots", "draft_threshold", "temperature", "seed", "logits")
ROUND_REST = DRAFT_REST[:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sampled", [False, True])
def test_draft_equals_single_steps(sampled: bool, dtype: torch.dtype, device: torch.device) -> None:
    args = arguments("draft", dtype, device, **(draws(device) if sampled else {}))
    args["logits"] = torch.empty(2, 2, args["head_weight"].shape[0], device=device)
    drafted, written = on_backend("triton", partial(run, "draft"), *positional(args, *DRAFT_REST))
    token, head = args["token"], [args[name] for name in ("norm_weight", "head_weight", "eps", "token_map", "scale")]
    layers = [args[name] for name in ("weights", "k_cache", "v_cache", "cos", "sin")]
    for row in range(3):
        at = args["seq_lens"] + row
        with lk.use_backend("triton"):
            hidden = run(
                "partial_forward", args["embedding"][token][:, None], *layers, at, 0, args["exit_layer"], args["eps"]
            )
            same_bits(drafted.states[:, row], hidden[:, 0])
            if row == 2:
                break
            noise = (args["temperature"], args["seed"], at) if sampled else (None, None, None)
            logits = torch.empty(2, args["head_weight"].shape[0], device=device)
            out = lk.exit_head(hidden[:, 0], *head, *noise, logits)
        token = out.token
        same_bits(drafted.tokens[:, row], token)
        close(drafted.probability[:, row], (out.logit - out.logsumexp).exp(), 1e-6)  # exp is another one
        same_bits(written[-1][:, row], logits)


def test_a_draft_stops_where_it_is_unsure(device: torch.device) -> None:
    """The token below the threshold and those after it are -1; the states up to it are there."""
    args = arguments("draft", torch.float32, device)
    free, _ = on_backend("triton", partial(run, "draft"), *positional(args, *DRAFT_REST))
    args["draft_threshold"] = float(free.probability[0, 1]) + 1e-6
    stopped, _ = on_backend("triton", partial(run, "draft"), *positional(args, *DRAFT_REST))
    truth, _ = on_backend("reference", partial(run, "draft"), *positional(args, *DRAFT_REST))
    assert stopped.tokens.tolist() == truth.tokens.tolist()
    assert (stopped.tokens == -1).any()
    for mine, true in zip((stopped.states, stopped.probability), (truth.states, truth.probability), strict=True):
        close(mine, true, 1e-5)


def test_a_probability_that_is_the_threshold_is_enough(device: torch.device) -> None:
    """And the next larger number is not."""
    args = arguments("draft", torch.float32, device)
    free, _ = on_backend("triton", partial(run, "draft"), *positional(args, *DRAFT_REST))
    least = free.probability.min()
    for limit, ends in ((least, False), (torch.nextafter(least, torch.ones_like(least)), True)):
        args["draft_threshold"] = float(limit)
        out, _ = on_backend("triton", partial(run, "draft"), *positional(args, *DRAFT_REST))
        assert bool(out.tokens.flatten()[free.probability.argmin()] < 0) == ends


def test_a_head_that_is_not_finite_ends_a_draft_only_with_a_threshold(device: torch.device) -> None:
    args = arguments("draft", torch.float32, device, draft_threshold=0.0)
    args["scale"] = torch.full_like(args["scale"], float("nan"))
    for args["draft_threshold"], states in ((0.0, 3), (0.01, 1)):
        out, _ = on_backend("triton", partial(run, "draft"), *positional(args, *DRAFT_REST))
        truth, _ = on_backend("reference", partial(run, "draft"), *positional(args, *DRAFT_REST))
        assert (out.tokens == -1).all()
        assert (out.states != 0).any(2).sum(1).tolist() == [states] * 2
        for mine, true in zip((out.states, out.probability), (truth.states, truth.probability), strict=True):
            close(mine, true, 1e-5)


def test_invalid_tokens(device: torch.device) -> None:
    args = arguments("draft", torch.float32, device, token=torch.tensor([3, -1]))
    if device.type != "cpu":
        pytest.skip("on a GPU looking would be a host sync")
    with lk.use_backend("triton"), pytest.raises(ValueError, match="token -1 is outside the vocabulary of 37"):
        run("draft", *positional(args, *DRAFT_REST))


@pytest.mark.parametrize(("draft_threshold", "sampled"), [(0.0, False), (0.2, False), (0.0, True)])
def test_speculative_round(draft_threshold: float, sampled: bool, device: torch.device) -> None:
    """Bit for bit the ops in a row, in slots of a larger cache; the tokens and lengths are the reference's."""
    more = {**(draws(device) if sampled else {}), "draft_threshold": draft_threshold}
    args = arguments("speculative_round", torch.float32, device, **more)
    args["slots"] = torch.tensor([2, 0], device=device)
    for name in ("k_cache", "v_cache"):
        args[name] = args[name][:, [1, 0, 0]].contiguous()
    given = positional(args, *ROUND_REST)
    ours, our_args = on_backend("triton", partial(run, "speculative_round"), *given)
    truth, true_args = on_backend("reference", partial(run, "speculative_round"), *given)
    apart = {name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()}
    with lk.use_backend("triton"):
        for mine, part in zip(ours, composed(apart), strict=True):
            same_bits(mine, part)
    assert ours.tokens.tolist() == truth.tokens.tolist()
    assert ours.accepted.tolist() == truth.accepted.tolist()
    assert ours.next_token.tolist() == truth.next_token.tolist()
    lengths = list(args).index("seq_lens")
    assert our_args[lengths].tolist() == true_args[lengths].tolist() == apart["seq_lens"].tolist()


@pytest.mark.parametrize("num_draft_layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_draft_with_draft_layers(num_draft_layers: int, device: torch.device) -> None:
    """Bit for bit the ops in a row, also in what is written to the cache; a layer of it belongs to nobody here."""
    args = arguments("draft", torch.float32, device, num_draft_layers=num_draft_layers)
    apart, before = copied(args), copied(args)
    with lk.use_backend("triton"):
        drafted, expected = run("draft", **args), test_draft.composed(apart)
    for mine, part in zip(drafted[:2], expected[:2], strict=True):
        same_bits(mine, part)
    close(drafted.probability, expected[2], 1e-6)  # exp is another one
    for name in ("k_cache", "v_cache"):
        same_bits(args[name], apart[name])
        same_bits(args[name][args["exit_layer"]], before[name][args["exit_layer"]])
    with lk.use_backend("reference"):
        truth = run("draft", **before)
    assert drafted.tokens.tolist() == truth.tokens.tolist()


@pytest.mark.parametrize("op", ["draft", "speculative_round"])
def test_packed_draft_layers_are_refused(op: str, device: torch.device) -> None:
    """Beside plain layers, too."""
    args = with_packed_draft_layers(arguments(op, torch.float32, device, num_draft_layers=1))
    with lk.use_backend("triton"), pytest.raises(lk.BackendError, match="packed weights are not served"):
        run(op, **args)


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
def test_a_round_with_a_draft_layer_and_its_own_norm(sampled: bool, device: torch.device) -> None:
    given = {**(draws(device) if sampled else {}), "num_draft_layers": 1}
    args = arguments("speculative_round", torch.float32, device, **given)
    args["draft_norm_weight"] = args["norm_weight"].flip(0).contiguous()
    apart, theirs = copied(args), copied(args)
    with lk.use_backend("triton"):
        ours, expected = run("speculative_round", **args), composed(apart)
    with lk.use_backend("reference"):
        truth = run("speculative_round", **theirs)
    for mine, part in zip(ours, expected, strict=True):
        same_bits(mine, part)
    for mine, true in zip(ours[:3], truth[:3], strict=True):
        assert mine.tolist() == true.tolist()
    assert args["seq_lens"].tolist() == theirs["seq_lens"].tolist() == apart["seq_lens"].tolist()


def copied(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()}
