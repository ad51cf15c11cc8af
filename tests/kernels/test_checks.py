"""Every error message of `_checks.py`, eagerly and while tracing."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import layerskip_kernels as lk
from layerskip_kernels import functional
from layerskip_kernels.schemas import OPTIONAL_WEIGHTS, REQUIRED_WEIGHTS

from .common import PATHS, Inputs, run, running_on
from .examples import CALLS, EPS, SIZES, example, layer_weights

Change = Callable[[Any], Any]


def to(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


def shape(*sizes: int) -> Change:
    return lambda tensor: tensor.new_zeros(sizes)


def value(new: Any) -> Change:
    return lambda old: new


def strided(tensor: Tensor) -> Tensor:
    """Same shape and values, but not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


DOUBLE, HALF, INT = to(torch.float64), to(torch.float16), to(torch.int32)
FLOATS = "float32, bfloat16, float16"

SHAPES = [
    ("rms_norm", "x", shape(), "x must have at least one dimension"),
    ("rms_norm", "weight", shape(31), "weight has shape [31], expected [32]"),
    ("rms_norm", "weight", shape(32, 1), "weight has shape [32, 1], expected [32]"),
    ("linear", "x", shape(5, 3, 32), "x has shape [5, 3, 32], expected [*, *]"),
    ("linear", "weight", shape(24, 31), "weight has shape [24, 31], expected [*, 32]"),
    ("linear", "bias", shape(23), "bias has shape [23], expected [24]"),
    ("linear", "residual", shape(4, 24), "residual has shape [4, 24], expected [5, 24]"),
    ("swiglu", "x", shape(32), "x has shape [32], expected [*, *]"),
    ("swiglu", "gate", shape(24, 31), "gate has shape [24, 31], expected [*, 32]"),
    ("swiglu", "up", shape(23, 32), "up has shape [23, 32], expected [24, 32]"),
    ("rope_kv_append", "q", shape(2, 3, 64), "q has shape [2, 3, 64], expected [*, *, *, *]"),
    ("rope_kv_append", "q", shape(2, 3, 4, 12), "head_dim must be a multiple of 8 up to 256, got 12"),
    ("rope_kv_append", "q", shape(2, 3, 4, 264), "head_dim must be a multiple of 8 up to 256, got 264"),
    ("rope_kv_append", "k", shape(2, 2, 2, 16), "k has shape [2, 2, 2, 16], expected [2, 3, *, 16]"),
    ("rope_kv_append", "v", shape(2, 3, 1, 16), "v has shape [2, 3, 1, 16], expected [2, 3, 2, 16]"),
    ("rope_kv_append", "k_cache", shape(3, 2, 12, 16), "k_cache has shape [3, 2, 12, 16], expected [2, *, *, 16]"),
    ("rope_kv_append", "v_cache", shape(2, 2, 11, 16), "v_cache has shape [2, 2, 11, 16], expected [2, 2, 12, 16]"),
    ("rope_kv_append", "seq_lens", shape(3), "seq_lens has shape [3], expected [2]"),
    ("rope_kv_append", "cos", shape(13, 16), "cos has shape [13, 16], expected [*, 8]"),
    ("rope_kv_append", "sin", shape(12, 8), "sin has shape [12, 8], expected [13, 8]"),
    ("verify_attention", "q", shape(2, 3, 64), "q has shape [2, 3, 64], expected [*, *, *, *]"),
    ("verify_attention", "q", shape(2, 3, 4, 20), "head_dim must be a multiple of 8 up to 256, got 20"),
    ("verify_attention", "q", shape(2, 3, 3, 16), "3 query heads are not a multiple of 2 key/value heads"),
    ("verify_attention", "q", shape(2, 13, 4, 16), "13 rows do not fit a cache of capacity 12"),
    ("verify_attention", "k_cache", shape(2, 2, 12, 8), "k_cache has shape [2, 2, 12, 8], expected [2, *, *, 16]"),
    ("verify_attention", "v_cache", shape(2, 1, 12, 16), "v_cache has shape [2, 1, 12, 16], expected [2, 2, 12, 16]"),
    ("verify_attention", "seq_lens", shape(1), "seq_lens has shape [1], expected [2]"),
    ("exit_head", "hidden", shape(1, 5, 32), "hidden has shape [1, 5, 32], expected [*, *]"),
    ("exit_head", "norm_weight", shape(33), "norm_weight has shape [33], expected [32]"),
    ("exit_head", "head_weight", shape(37, 33), "head_weight has shape [37, 33], expected [*, 32]"),
    ("exit_head", "head_weight", shape(0, 32), "head_weight has no rows"),
    ("exit_head", "token_map", shape(36), "token_map has shape [36], expected [37]"),
    ("exit_head", "scale", shape(37, 1), "scale has shape [37, 1], expected [37]"),
    ("partial_forward", "hidden", shape(6, 32), "hidden has shape [6, 32], expected [*, *, *]"),
    ("partial_forward", "hidden", shape(2, 13, 32), "13 rows do not fit a cache of capacity 12"),
    ("partial_forward", "k_cache", shape(2, 2, 12, 16), "k_cache has shape [2, 2, 12, 16], expected [*, *, *, *, *]"),
    ("partial_forward", "k_cache", shape(2, 3, 2, 12, 16),
     "k_cache has shape [2, 3, 2, 12, 16], expected [2, 2, *, *, 16]"),
    ("partial_forward", "k_cache", shape(2, 2, 2, 12, 12), "head_dim must be a multiple of 8 up to 256, got 12"),
    ("partial_forward", "v_cache", shape(1, 2, 2, 12, 16),
     "v_cache has shape [1, 2, 2, 12, 16], expected [2, 2, 2, 12, 16]"),
    ("partial_forward", "seq_lens", shape(2, 1), "seq_lens has shape [2, 1], expected [2]"),
    ("partial_forward", "cos", shape(13, 9), "cos has shape [13, 9], expected [*, 8]"),
    ("partial_forward", "sin", shape(13, 9), "sin has shape [13, 9], expected [13, 8]"),
    ("partial_forward", "weights", lambda weights: weights[:-1],
     "layers [0, 2) take 9 or 14 weights each, got 17 for 2 layers"),
    ("draft", "token", shape(2, 1), "token has shape [2, 1], expected [*]"),
    ("draft", "embedding", shape(37), "embedding has shape [37], expected [*, *]"),
    ("draft", "embedding", shape(0, 32), "embedding has no rows"),
    ("draft", "head_weight", shape(37, 31), "head_weight has shape [37, 31], expected [*, 32]"),
    ("draft", "weights", lambda weights: weights[:-1], "layers [0, 2) take 9 or 14 weights each, got 17 for 2 layers"),
    ("accept_greedy", "draft", shape(2), "draft has shape [2], expected [*, *]"),
    ("accept_greedy", "target", shape(2, 4), "target has shape [2, 4], expected [2, 5]"),
    ("accept_greedy", "seq_lens", shape(3), "seq_lens has shape [3], expected [2]"),
    ("accept_sampled", "draft", shape(2), "draft has shape [2], expected [*, *]"),
    ("accept_sampled", "draft_logits", shape(2, 3, 3), "draft_logits has shape [2, 3, 3], expected [2, 4, *]"),
    ("accept_sampled", "target_logits", shape(2, 4, 37), "target_logits has shape [2, 4, 37], expected [2, 5, *]"),
    ("accept_sampled", "target_logits", shape(2, 5, 0), "target_logits has no tokens"),
    ("accept_sampled", "draft_logits", shape(2, 4, 0), "draft_logits has no tokens"),
    ("accept_sampled", "seq_lens", shape(3), "seq_lens has shape [3], expected [2]"),
    ("accept_sampled", "temperature", shape(3), "temperature has shape [3], expected [2]"),
    ("accept_sampled", "seed", shape(2, 1), "seed has shape [2, 1], expected [2]"),
    ("accept_sampled", "token_map", shape(4), "token_map has shape [4], expected [3]"),
    ("accept_sampled", "token_map", value(None),
     "draft_logits has 3 tokens, target_logits 37: without a token_map they must agree"),
    ("speculative_round", "token", shape(2, 1), "token has shape [2, 1], expected [*]"),
    ("speculative_round", "embedding", shape(0, 32), "embedding has no rows"),
    ("speculative_round", "k_cache", shape(2, 2, 12, 16), "k_cache has shape [2, 2, 12, 16], expected [*, *, *, *, *]"),
    ("speculative_round", "weights", lambda weights: weights[:9],
     "layers [0, 2) take 9 or 14 weights each, got 9 for 2 layers"),
    ("speculative_round", "head_weight", shape(37, 31), "head_weight has shape [37, 31], expected [*, 32]"),
    ("speculative_round", "draft_head_weight", shape(37, 31), "draft_head_weight has shape [37, 31], expected [*, 32]"),
    ("speculative_round", "draft_head_weight", shape(0, 32), "draft_head_weight has no rows"),
    ("speculative_round", "draft_head_weight", value(None),
     "draft_token_map, draft_head_scale needs a draft_head_weight"),
    ("speculative_round", "draft_token_map", shape(36), "draft_token_map has shape [36], expected [37]"),
    ("speculative_round", "draft_head_scale", shape(36), "draft_head_scale has shape [36], expected [37]"),
    ("speculative_round", "seq_lens", shape(3), "seq_lens has shape [3], expected [2]"),
]  # fmt: skip
# With slots and sampling.
OPTIONS = [
    ("rope_kv_append", "slots", shape(3), ValueError, "slots has shape [3], expected [2]"),
    ("rope_kv_append", "slots", INT, TypeError, "slots has dtype int32, expected int64"),
    ("rope_kv_append", "k_cache", shape(1, 2, 12, 16), ValueError, "v_cache has shape [3, 2, 12, 16], expected [1"),
    ("verify_attention", "slots", shape(2, 1), ValueError, "slots has shape [2, 1], expected [2]"),
    ("verify_attention", "slots", strided, ValueError, "slots must be contiguous, its strides are (2,)"),
    ("exit_head", "temperature", shape(4), ValueError, "temperature has shape [4], expected [5]"),
    ("exit_head", "temperature", DOUBLE, TypeError, "temperature has dtype float64, expected float32"),
    ("exit_head", "temperature", value(None), ValueError,
     "temperature, seed, offset come together, temperature is missing"),
    ("exit_head", "seed", value(None), ValueError, "temperature, seed, offset come together, seed is missing"),
    ("exit_head", "offset", value(None), ValueError, "temperature, seed, offset come together, offset is missing"),
    ("exit_head", "seed", INT, TypeError, "seed has dtype int32, expected int64"),
    ("exit_head", "offset", shape(5, 1), ValueError, "offset has shape [5, 1], expected [5]"),
    ("exit_head", "offset", strided, ValueError, "offset must be contiguous, its strides are (2,)"),
    ("exit_head", "logits", shape(5, 36), ValueError, "logits has shape [5, 36], expected [5, 37]"),
    ("exit_head", "logits", HALF, TypeError, "logits has dtype float16, expected float32"),
    ("exit_head", "logits", strided, ValueError, "the rows of logits must be contiguous, its strides are (74, 2)"),
    ("partial_forward", "slots", shape(1), ValueError, "slots has shape [1], expected [2]"),
    ("draft", "slots", INT, TypeError, "slots has dtype int32, expected int64"),
    ("draft", "draft_threshold", value(-0.1), ValueError, "draft_threshold must lie in [0, 1], got -0.1"),
    ("draft", "seed", value(None), ValueError, "temperature, seed come together, seed is missing"),
    ("draft", "temperature", value(None), ValueError, "temperature, seed come together, temperature is missing"),
    ("draft", "seed", shape(3), ValueError, "seed has shape [3], expected [2]"),
    ("draft", "logits", shape(2, 4, 36), ValueError, "logits has shape [2, 4, 36], expected [2, 4, 37]"),
    ("draft", "logits", strided, ValueError, "the rows of logits must be contiguous, its strides are (296, 74, 2)"),
    ("speculative_round", "draft_threshold", value(1.5), ValueError, "draft_threshold must lie in [0, 1], got 1.5"),
    ("speculative_round", "draft_threshold", value(0.5), ValueError, "draft_threshold is 0.5 with a temperature"),
    ("speculative_round", "temperature", value(None), ValueError, "temperature, seed come together"),
    ("speculative_round", "seed", INT, TypeError, "seed has dtype int32, expected int64"),
    ("speculative_round", "slots", shape(3), ValueError, "slots has shape [3], expected [2]"),
    ("draft", "num_draft_layers", value(-1), ValueError,
     "num_draft_layers must lie in [0, 2], got -1, with a cache of 3 layers"),
    ("draft", "num_draft_layers", value(3), ValueError, "num_draft_layers must lie in [0, 2], got 3"),
    ("draft", "num_draft_layers", value(2), ValueError,
     "layers [0, 1) and 2 draft layers take 9 or 14 weights each, got 18 for 3 layers"),
    ("draft", "weights", lambda weights: weights[:-1], ValueError,
     "layers [0, 1) and 1 draft layers take 9 or 14 weights each, got 17 for 2 layers"),
    ("speculative_round", "num_draft_layers", value(-1), ValueError,
     "num_draft_layers must lie in [0, 2], got -1, with a cache of 3 layers"),
    ("speculative_round", "num_draft_layers", value(3), ValueError, "num_draft_layers must lie in [0, 2], got 3"),
    ("speculative_round", "weights", lambda weights: weights[:-9], ValueError,
     "layers [0, 2) and 1 draft layers take 9 or 14 weights each, got 18 for 3 layers"),
    ("speculative_round", "draft_norm_weight", shape(31), ValueError,
     "draft_norm_weight has shape [31], expected [32]"),
    ("speculative_round", "draft_norm_weight", HALF, TypeError,
     "draft_norm_weight has dtype float16, expected float32"),
    ("speculative_round", "draft_norm_weight", strided, ValueError,
     "draft_norm_weight must be contiguous, its strides are (2,)"),
]  # fmt: skip

DTYPES = [
    ("rms_norm", "x", DOUBLE, f"x has dtype float64, expected {FLOATS}"),
    ("rms_norm", "weight", HALF, "weight has dtype float16, expected float32"),
    ("linear", "x", INT, f"x has dtype int32, expected {FLOATS}"),
    ("linear", "weight", HALF, "weight has dtype float16, expected float32"),
    ("linear", "bias", HALF, "bias has dtype float16, expected float32"),
    ("linear", "residual", HALF, "residual has dtype float16, expected float32"),
    ("swiglu", "x", DOUBLE, f"x has dtype float64, expected {FLOATS}"),
    ("swiglu", "gate", HALF, "gate has dtype float16, expected float32"),
    ("swiglu", "up", HALF, "up has dtype float16, expected float32"),
    ("rope_kv_append", "q", DOUBLE, f"q has dtype float64, expected {FLOATS}"),
    ("rope_kv_append", "k", HALF, "k has dtype float16, expected float32"),
    ("rope_kv_append", "v", HALF, "v has dtype float16, expected float32"),
    ("rope_kv_append", "cos", HALF, "cos has dtype float16, expected float32"),
    ("rope_kv_append", "sin", DOUBLE, "sin has dtype float64, expected float32"),
    ("rope_kv_append", "k_cache", HALF, "k_cache has dtype float16, expected float32"),
    ("rope_kv_append", "v_cache", HALF, "v_cache has dtype float16, expected float32"),
    ("rope_kv_append", "seq_lens", INT, "seq_lens has dtype int32, expected int64"),
    ("verify_attention", "q", DOUBLE, f"q has dtype float64, expected {FLOATS}"),
    ("verify_attention", "k_cache", HALF, "k_cache has dtype float16, expected float32"),
    ("verify_attention", "v_cache", HALF, "v_cache has dtype float16, expected float32"),
    ("verify_attention", "seq_lens", INT, "seq_lens has dtype int32, expected int64"),
    ("exit_head", "hidden", DOUBLE, f"hidden has dtype float64, expected {FLOATS}"),
    ("exit_head", "norm_weight", HALF, "norm_weight has dtype float16, expected float32"),
    ("exit_head", "head_weight", to(torch.float32), "head_weight has dtype float32, expected int8"),
    ("exit_head", "scale", value(None), "head_weight has dtype int8, expected float32"),
    ("exit_head", "scale", HALF, "scale has dtype float16, expected float32"),
    ("exit_head", "token_map", INT, "token_map has dtype int32, expected int64"),
    ("partial_forward", "hidden", DOUBLE, f"hidden has dtype float64, expected {FLOATS}"),
    ("partial_forward", "k_cache", HALF, "k_cache has dtype float16, expected float32"),
    ("partial_forward", "v_cache", HALF, "v_cache has dtype float16, expected float32"),
    ("partial_forward", "cos", HALF, "cos has dtype float16, expected float32"),
    ("partial_forward", "seq_lens", INT, "seq_lens has dtype int32, expected int64"),
    ("accept_greedy", "draft", INT, "draft has dtype int32, expected int64"),
    ("accept_greedy", "target", INT, "target has dtype int32, expected int64"),
    ("accept_greedy", "seq_lens", INT, "seq_lens has dtype int32, expected int64"),
    ("draft", "token", INT, "token has dtype int32, expected int64"),
    ("draft", "embedding", DOUBLE, f"embedding has dtype float64, expected {FLOATS}"),
    ("accept_sampled", "draft", INT, "draft has dtype int32, expected int64"),
    ("accept_sampled", "draft_logits", HALF, "draft_logits has dtype float16, expected float32"),
    ("accept_sampled", "target_logits", DOUBLE, "target_logits has dtype float64, expected float32"),
    ("accept_sampled", "temperature", HALF, "temperature has dtype float16, expected float32"),
    ("accept_sampled", "seed", INT, "seed has dtype int32, expected int64"),
    ("accept_sampled", "token_map", INT, "token_map has dtype int32, expected int64"),
    ("speculative_round", "k_cache", HALF, "k_cache has dtype float16, expected float32"),
    ("speculative_round", "draft_head_scale", value(None), "draft_head_weight has dtype int8, expected float32"),
    ("speculative_round", "draft_token_map", INT, "draft_token_map has dtype int32, expected int64"),
]

RANGES = [
    ("rms_norm", "eps", value(-1.0), "eps must not be negative, got -1.0"),
    ("exit_head", "eps", value(-1.0), "eps must not be negative, got -1.0"),
    ("partial_forward", "eps", value(-1.0), "eps must not be negative, got -1.0"),
    ("partial_forward", "start", value(-1), "layers [-1, 2) are not within the cache's 2 layers"),
    ("partial_forward", "end", value(3), "layers [0, 3) are not within the cache's 2 layers"),
    ("partial_forward", "start", value(3), "layers [3, 2) are not within the cache's 2 layers"),
    ("draft", "num_speculations", value(-1), "num_speculations must not be negative, got -1"),
    ("draft", "num_speculations", value(2**31), "num_speculations must be below 2147483647, got 2147483648"),
    ("draft", "exit_layer", value(0), "exit_layer must be at least 1, got 0"),
    ("speculative_round", "num_speculations", value(-1), "num_speculations must not be negative, got -1"),
    ("speculative_round", "num_speculations", value(12), "13 rows do not fit a cache of capacity 12"),
    ("speculative_round", "exit_layer", value(0), "exit_layer must lie in [1, 2], got 0"),
    ("speculative_round", "exit_layer", value(3), "exit_layer must lie in [1, 2], got 3"),
]

STRIDES = [
    (op, name)
    for op, names in {
        "rms_norm": ["weight"],
        "linear": ["weight", "bias"],
        "swiglu": ["gate", "up"],
        "rope_kv_append": ["cos", "sin", "k_cache", "v_cache", "seq_lens"],
        "verify_attention": ["k_cache", "v_cache", "seq_lens"],
        "exit_head": ["norm_weight", "head_weight", "token_map", "scale"],
        "partial_forward": ["k_cache", "v_cache", "cos", "sin", "seq_lens"],
        "accept_greedy": ["seq_lens"],
        "draft": ["embedding", "k_cache", "seq_lens", "head_weight"],
        "accept_sampled": ["seq_lens", "temperature", "seed", "token_map"],
        "speculative_round": [
            "embedding",
            "v_cache",
            "seq_lens",
            "head_weight",
            "draft_head_weight",
            "draft_token_map",
            "draft_head_scale",
        ],
    }.items()
    for name in names
]


def changed(op: str, name: str, change: Change, options: bool = False) -> dict[str, Any]:
    args = example(op, options=options)
    args[name] = change(args[name])
    return args


def refuse(args: dict[str, Any], op: str, error: type[Exception], message: str) -> None:
    """Both ways in must raise the same: the public function, and its fake, which tracing calls."""
    for function in (partial(run, op), getattr(torch.ops.layerskip, op)):
        with pytest.raises(error, match=re.escape(message)):
            function(*args.values())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [_fake(mode, arg) for arg in args.values()]
        with pytest.raises(error, match=re.escape(message)):
            getattr(torch.ops.layerskip, op)(*fakes)


def _fake(mode: FakeTensorMode, arg: Any) -> Any:
    if isinstance(arg, list):
        return [_fake(mode, one) for one in arg]
    return mode.from_tensor(arg) if isinstance(arg, Tensor) else arg


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu":
        from layerskip_kernels._extension import cpu_reason

        if cpu_reason is not None:
            pytest.skip(f"no native kernels: {cpu_reason}")
    with lk.use_backend(request.param):
        yield


@pytest.mark.parametrize(("op", "options"), CALLS)
def test_the_examples_are_valid(op: str, options: bool) -> None:
    run(op, *example(op, options=options).values())


@pytest.mark.parametrize(("op", "name", "change", "message"), SHAPES)
def test_shapes(op: str, name: str, change: Change, message: str) -> None:
    refuse(changed(op, name, change), op, ValueError, message)


@pytest.mark.parametrize(("op", "name", "change", "message"), DTYPES)
def test_dtypes(op: str, name: str, change: Change, message: str) -> None:
    refuse(changed(op, name, change), op, TypeError, message)


@pytest.mark.parametrize(("op", "name", "change", "message"), RANGES)
def test_ranges(op: str, name: str, change: Change, message: str) -> None:
    refuse(changed(op, name, change), op, ValueError, message)


@pytest.mark.parametrize(("op", "name", "change", "error", "message"), OPTIONS)
def test_options(op: str, name: str, change: Change, error: type[Exception], message: str) -> None:
    refuse(changed(op, name, change, options=True), op, error, message)


def test_more_sequences_than_the_cache_has_rows() -> None:
    args = example("verify_attention", options=True)
    for name in ("k_cache", "v_cache"):
        args[name] = args[name][:1]
    refuse(args, "verify_attention", ValueError, "slots has 2 entries, the cache only 1 rows")


def test_a_cache_without_the_draft_layers() -> None:
    args = example("speculative_round", options=True)
    for name in ("k_cache", "v_cache"):
        args[name] = args[name][:2]
    message = "layers [0, 1) and 1 draft layers take 9 or 14 weights each, got 27 for 2 layers"
    refuse(args, "speculative_round", ValueError, message)


def test_a_round_that_samples_needs_to_know_the_drafts_tokens() -> None:
    args = example("speculative_round", options=True)
    args.update(
        draft_head_weight=args["draft_head_weight"][:9],
        draft_head_scale=args["draft_head_scale"][:9],
        draft_token_map=None,
    )
    message = "draft_head_weight has 9 rows, head_weight 37: to sample without a draft_token_map they must agree"
    refuse(args, "speculative_round", ValueError, message)


@pytest.mark.parametrize(("op", "name"), STRIDES)
def test_strides(op: str, name: str) -> None:
    args = changed(op, name, strided)
    assert not args[name].is_contiguous()
    message = f"{name} must be contiguous, its strides are {tuple(args[name].stride())}"
    refuse(args, op, ValueError, message)


@pytest.mark.parametrize("layer", range(SIZES["L"]))
@pytest.mark.parametrize("place", [place for place, name in enumerate(REQUIRED_WEIGHTS) if "norm" not in name])
@pytest.mark.parametrize("op", ["partial_forward", "draft", "speculative_round"])
def test_strides_of_layers(op: str, place: int, layer: int) -> None:
    """Of every layer, not only of the first, whose shapes the others are compared with."""
    args = example(op)
    at = layer * len(REQUIRED_WEIGHTS) + place
    args["weights"][at] = strided(args["weights"][at])
    message = f"{REQUIRED_WEIGHTS[place]} must be contiguous, its strides are {tuple(args['weights'][at].stride())}"
    refuse(args, op, ValueError, message)


@pytest.mark.parametrize(
    ("op", "name", "options"),
    [
        (op, name, options)
        for op, options in CALLS
        for name, arg in list(example(op, options=options).items())[1:]
        if isinstance(arg, Tensor) and (not options or name not in example(op))
    ],
)
def test_devices(op: str, name: str, options: bool) -> None:
    args = changed(op, name, lambda tensor: tensor.to("meta"), options)
    with pytest.raises(ValueError, match=rf"{name} is on meta, .* on cpu|is on cpu, the first argument on meta"):
        run(op, *args.values())


def test_one_more_row_than_the_cache_holds() -> None:
    args = example("rope_kv_append")
    for name in ("q", "k", "v"):
        args[name] = args[name].new_zeros(2, 13, *args[name].shape[2:])
    refuse(args, "rope_kv_append", ValueError, "13 rows do not fit a cache of capacity 12")


def test_cache_of_other_heads_than_the_keys() -> None:
    args = example("rope_kv_append")
    for name in ("k_cache", "v_cache"):
        args[name] = args[name].new_zeros(2, 1, 12, 16)
    refuse(args, "rope_kv_append", ValueError, "k has 2 key/value heads, the cache 1")


@pytest.mark.parametrize("op", ["rope_kv_append", "partial_forward"])
def test_tables_shorter_than_the_cache(op: str) -> None:
    args = example(op)
    args["cos"], args["sin"] = args["cos"][:11], args["sin"][:11]
    refuse(args, op, ValueError, "cos has 11 positions, the cache's capacity is 12")


@pytest.mark.parametrize("op", ["rope_kv_append", "verify_attention", "exit_head", "partial_forward"])
def test_inference_ops_have_no_backward(op: str) -> None:
    args = example(op)
    first = next(iter(args))
    args[first].requires_grad_()
    with pytest.raises(ValueError, match=f"{op} has no backward; call it under torch.no_grad"):
        run(op, *args.values())
    with torch.no_grad():
        run(op, *args.values())


LAYER = [
    ("attn_norm", shape(31), ValueError, "attn_norm has shape [31], expected [32]"),
    ("q", shape(63, 32), ValueError, "q has 63 rows, not a multiple of 2 heads of size 16"),
    ("k", shape(32, 31), ValueError, "k has shape [32, 31], expected [32, 32]"),
    ("v", shape(31, 32), ValueError, "v has shape [31, 32], expected [32, 32]"),
    ("o", shape(32, 63), ValueError, "o has shape [32, 63], expected [32, 64]"),
    ("mlp_norm", HALF, TypeError, "mlp_norm has dtype float16, expected float32"),
    ("gate", shape(24, 31), ValueError, "gate has shape [24, 31], expected [24, 32]"),
    ("up", shape(23, 32), ValueError, "up has shape [23, 32], expected [24, 32]"),
    ("down", shape(32, 23), ValueError, "down has shape [32, 23], expected [32, 24]"),
    ("down", strided, ValueError, "down must be contiguous"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), LAYER)
def test_layer_weights(name: str, change: Change, error: type[Exception], message: str) -> None:
    weights = layer_weights(Inputs(torch.float32))
    sizes = SIZES["D"], SIZES["G"], SIZES["C"], torch.float32
    functional.check_layer_weights(list(weights.values()), *sizes)
    weights[name] = change(weights[name])
    with pytest.raises(error, match=re.escape(message)):
        functional.check_layer_weights(list(weights.values()), *sizes)


OPTIONAL = {"q_bias": 64, "k_bias": 32, "v_bias": 32, "q_norm": 16, "k_norm": 16}


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_layer_weights(name: str) -> None:
    plain = list(layer_weights(Inputs(torch.float32)).values())
    sizes = SIZES["D"], SIZES["G"], SIZES["C"], torch.float32
    assert tuple(OPTIONAL) == OPTIONAL_WEIGHTS
    functional.check_layer_weights([*plain, *(torch.zeros(size) for size in OPTIONAL.values())], *sizes)
    functional.check_layer_weights([*plain, *[torch.empty(0)] * 5], *sizes)
    wrong = [torch.zeros(size + 1 if name == other else 0) for other, size in OPTIONAL.items()]
    with pytest.raises(ValueError, match=rf"{name} has shape \[{OPTIONAL[name] + 1}\], expected \[{OPTIONAL[name]}\]"):
        functional.check_layer_weights([*plain, *wrong], *sizes)


@pytest.mark.parametrize("path", PATHS)
def test_width_zero(path: str) -> None:
    with running_on(path):
        assert lk.linear(torch.empty(2, 0), torch.empty(3, 0)).tolist() == [[0.0] * 3] * 2
        assert lk.exit_head(torch.empty(2, 0), torch.empty(0), torch.empty(5, 0), EPS).token.tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(2, 8, 5), (4096, 8, 0)])
def test_a_third_dimension_is_refused_by_the_native_head(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="hidden has shape"):
        lk.exit_head(torch.zeros(shape), torch.ones(8), torch.ones(16, 8), EPS)


def test_a_third_dimension_is_refused_by_the_native_forward() -> None:
    args = example("partial_forward")
    with pytest.raises(ValueError, match="hidden has shape"):
        run("partial_forward", args.pop("hidden")[..., None], *args.values())
