"""One valid small call of every op, by name, for the tests that treat all ops alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.formats import quantize
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, layer_shapes

from .common import Inputs, rope_tables

# B, M, D, H, G, C, F, V, T, L, K
SIZES = {"B": 2, "M": 3, "D": 32, "H": 4, "G": 2, "C": 16, "F": 24, "V": 37, "T": 12, "L": 2, "K": 4}
EPS = 1e-5

OPS = (
    "rms_norm",
    "linear",
    "swiglu",
    "rope_kv_append",
    "verify_attention",
    "exit_head",
    "partial_forward",
    "draft",
    "accept_greedy",
    "accept_sampled",
    "speculative_round",
)
WITH_OPTIONS = ("rope_kv_append", "verify_attention", "exit_head", "partial_forward", "draft", "speculative_round")
CALLS = [(op, False) for op in OPS] + [(op, True) for op in WITH_OPTIONS]  # with and without slots and sampling
MUTATES = {
    "rope_kv_append": ("k_cache", "v_cache"),
    "partial_forward": ("k_cache", "v_cache"),
    "draft": ("k_cache", "v_cache"),
    "accept_greedy": ("seq_lens",),
    "accept_sampled": ("seq_lens",),
    "speculative_round": ("k_cache", "v_cache", "seq_lens"),
}


def layer_weights(make: Inputs) -> dict[str, Tensor]:
    """The nine tensors of a layer, by name."""
    shapes = layer_shapes(*(SIZES[letter] for letter in "DHGCF"))
    return {name: (make.norm if "norm" in name else make.weight)(*shapes[name]) for name in REQUIRED_WEIGHTS}


def with_draft_layers(args: dict[str, Any], num_draft_layers: int = 1) -> dict[str, Any]:
    """``args`` of a draft or a round, and draft layers after the first; the count comes last in the schemas, too.

    A draft does without the second layer, whose place in the cache stays.
    """
    make = Inputs(args["embedding"].dtype, seed=7)
    if "extend" in args:
        args = {**args, "weights": args["weights"][: len(REQUIRED_WEIGHTS)]}
    draft_layers = [weight for _ in range(num_draft_layers) for weight in layer_weights(make).values()]
    caches = {name: args[name] for name in ("k_cache", "v_cache")}
    for name, cache in caches.items():
        caches[name] = torch.cat([cache, make.normal(num_draft_layers, *cache.shape[1:])])
    return {
        **args,
        "weights": args["weights"] + draft_layers,
        **caches,
        "exit_layer": 1,
        "num_draft_layers": num_draft_layers,
    }


def with_packed_draft_layers(args: dict[str, Any]) -> dict[str, Any]:
    """``args`` of `with_draft_layers` with the draft layers in int8, but for `down`, whose width no group suits."""
    each, weights = len(REQUIRED_WEIGHTS), list(args["weights"])
    for index in range(len(weights) - each * args["num_draft_layers"], len(weights)):
        if REQUIRED_WEIGHTS[index % each] in ("q", "k", "v", "o", "gate", "up"):
            weights[index] = quantize(weights[index], "int8")
    return {**args, "weights": weights}


def with_options(op: str, args: dict[str, Any]) -> dict[str, Any]:
    """``args`` of `example`, and slots in a cache of three rows, sampling, logits to write, and a draft layer."""
    B, K, V = SIZES["B"], SIZES["K"], SIZES["V"]
    draws = {"temperature": torch.tensor([0.7, 0.0]), "seed": torch.tensor([3, -(2**40)])}
    if op == "exit_head":
        per_row = {name: tensor.repeat(3)[:5] for name, tensor in draws.items()}
        return {**args, **per_row, "offset": torch.arange(5), "logits": torch.zeros(5, V)}
    rows = 1 if args["k_cache"].dim() == 5 else 0
    for name in ("k_cache", "v_cache"):
        args[name] = torch.cat([args[name], args[name].narrow(rows, 0, 1)], rows)
    args["slots"] = torch.tensor([2, 0])
    if op == "speculative_round":
        own_norm = Inputs(args["norm_weight"].dtype, seed=6).norm(SIZES["D"])
        args = with_draft_layers({**args, "draft_threshold": 0.0, **draws, "draft_norm_weight": own_norm})
    if op == "draft":
        args.update(draft_threshold=0.05, **draws, logits=torch.zeros(B, K, V))
        args = with_draft_layers(args)
    return args


def example(op: str, dtype: torch.dtype = torch.float32, options: bool = False) -> dict[str, Any]:
    """Arguments of ``op``, by name and in its order; with ``options`` those that it can do without, too."""
    return with_options(op, _example(op, dtype)) if options else _example(op, dtype)


def _example(op: str, dtype: torch.dtype) -> dict[str, Any]:
    make = Inputs(dtype)
    B, M, D, H, G, C, F, V, T, L, K = SIZES.values()
    cos, sin = rope_tables(T + 1, C)
    step = {
        "cos": cos,
        "sin": sin,
        "k_cache": make.normal(B, G, T, C),
        "v_cache": make.normal(B, G, T, C),
        "seq_lens": torch.tensor([5, 0]),
    }
    if op == "rms_norm":
        return {"x": make.normal(5, D), "weight": make.norm(D), "eps": EPS}
    if op == "linear":
        return {"x": make.normal(5, D), "weight": make.weight(F, D), "bias": make.normal(F),
                "residual": make.normal(5, F)}  # fmt: skip
    if op == "swiglu":
        return {"x": make.normal(5, D), "gate": make.weight(F, D), "up": make.weight(F, D)}
    if op == "rope_kv_append":
        return {"q": make.normal(B, M, H, C), "k": make.normal(B, M, G, C), "v": make.normal(B, M, G, C), **step}
    if op == "verify_attention":
        return {"q": make.normal(B, M, H, C), **{name: step[name] for name in ("k_cache", "v_cache", "seq_lens")}}
    if op == "exit_head":
        head = make.integers(-99, 99, V, D).to(torch.int8)
        return {"hidden": make.normal(5, D), "norm_weight": make.norm(D), "head_weight": head, "eps": EPS,
                "token_map": torch.arange(V).flip(0), "scale": torch.full((V,), 0.01)}  # fmt: skip
    if op == "partial_forward":
        weights = [weight for _ in range(L) for weight in layer_weights(make).values()]
        caches = {name: make.normal(L, B, G, T, C) for name in ("k_cache", "v_cache")}
        return {"hidden": make.normal(B, M, D), "weights": weights, **caches, "cos": cos, "sin": sin,
                "seq_lens": step["seq_lens"], "start": 0, "end": L, "eps": EPS}  # fmt: skip
    if op == "draft":
        layers, head = example("partial_forward", dtype), example("exit_head", dtype)
        shared = {name: layers[name] for name in ("weights", "k_cache", "v_cache", "cos", "sin", "seq_lens")}
        return {"token": make.integers(0, V, B), "embedding": make.normal(V, D), **shared, "exit_layer": L,
                "norm_weight": head["norm_weight"], "head_weight": head["head_weight"], "eps": EPS,
                "num_speculations": K, "extend": True,
                **{name: head[name] for name in ("token_map", "scale")}}  # fmt: skip
    if op == "speculative_round":
        layers, head = example("partial_forward", dtype), example("exit_head", dtype)
        shared = {name: layers[name] for name in ("weights", "k_cache", "v_cache", "cos", "sin", "seq_lens")}
        return {"token": make.integers(0, V, B), "embedding": make.normal(V, D), **shared, "exit_layer": 1,
                "norm_weight": head["norm_weight"], "head_weight": make.weight(V, D), "eps": EPS, "num_speculations": K,
                "draft_head_weight": head["head_weight"], "draft_token_map": head["token_map"],
                "draft_head_scale": head["scale"]}  # fmt: skip
    if op == "accept_sampled":
        wide = Inputs(torch.float32)
        return {"draft": make.integers(0, 3, B, K), "draft_logits": wide.normal(B, K, 3),
                "target_logits": wide.normal(B, K + 1, V), "seq_lens": step["seq_lens"],
                "temperature": torch.tensor([0.7, 0.0]), "seed": torch.tensor([3, 2**40]),
                "token_map": torch.tensor([2, 0, 1])}  # fmt: skip
    assert op == "accept_greedy"
    draft = make.integers(0, 2, B, K)
    return {"draft": draft, "target": make.integers(0, 2, B, K + 1), "seq_lens": torch.tensor([5, 0])}
