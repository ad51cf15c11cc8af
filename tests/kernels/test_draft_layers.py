"""Draft layers of `draft` and `speculative_round`: what they compute, where they write, and that no token changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip_kernels import reference
from layerskip_kernels.schemas import bind
from layerskip_kernels.speculative import compose_draft

from .common import (
    DTYPES,
    PATHS,
    TOLERANCES,
    Inputs,
    assert_same_bits,
    assert_threads_agree,
    double,
    rope_tables,
    run,
    running_on,
)
from .examples import EPS, SIZES, example, layer_weights, with_draft_layers, with_packed_draft_layers
from .test_draft import assert_same_draft, composed

CACHES = ("k_cache", "v_cache")
EACH = 9  # weights of a layer


def draft_args(dtype: torch.dtype, num_draft_layers: int = 2, **changes: Any) -> dict[str, Any]:
    """The example, whose cache has layers 0, 1 and those of the draft layers, and NaN beyond the lengths."""
    args = with_draft_layers(example("draft", dtype), num_draft_layers)
    for name in CACHES:
        for b, length in enumerate(args["seq_lens"].tolist()):
            args[name][:, b, :, length:] = float("nan")
    return {**args, **changes}


@pytest.mark.parametrize("extend", [True, False])
@pytest.mark.parametrize(("num_draft_layers", "packed"), [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_a_draft_is_the_composition_of_the_ops(
    path: str, dtype: torch.dtype, num_draft_layers: int, packed: bool, extend: bool
) -> None:
    """Also where the draft layers are packed beside plain layers."""
    args, other = (draft_args(dtype, num_draft_layers, extend=extend) for _ in range(2))
    if packed:
        args, other = with_packed_draft_layers(args), with_packed_draft_layers(other)
    with running_on(path):
        assert_same_draft(run("draft", **args), composed(other))
    assert_same_bits([args[name] for name in CACHES], [other[name] for name in CACHES])


@pytest.mark.parametrize("extend", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_only_the_drafts_own_layers_and_positions_of_the_cache_are_written(path: str, extend: bool) -> None:
    """Layers [0, E) and the last n of the cache, at the rows that were drafted; all of them, finite."""
    args, before = (draft_args(torch.float32, extend=extend) for _ in range(2))
    with running_on(path):
        run("draft", **args)
    for name in CACHES:
        for b, length in enumerate(args["seq_lens"].tolist()):
            rows = slice(length, length + SIZES["K"] + extend)
            for layer in (0, 2, 3):
                assert args[name][layer, b, :, rows].isfinite().all()
                args[name][layer, b, :, rows] = before[name][layer, b, :, rows]
    assert_same_bits([args[name] for name in CACHES], [before[name] for name in CACHES])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_error_against_float64(path: str, dtype: torch.dtype) -> None:
    """Of all that one step writes: a later one follows tokens that may differ."""
    args = one_step(dtype)
    eager = {name: arg.clone() if isinstance(arg, Tensor) else arg for name, arg in args.items()}
    truth = {name: double(arg) for name, arg in args.items()}
    with running_on(path):
        out = run("draft", **args)
    same = reference.draft_ref(*bind("draft", **eager))
    true_state, true_logits = float64_step(truth)
    pairs = [(out.states[:, 0], same[1][:, 0], true_state), (args["logits"][:, 0], eager["logits"][:, 0], true_logits)]
    for layer in (0, 2, 3):
        pairs += [tuple(written(one[name][layer], args["seq_lens"]) for one in (args, eager, truth)) for name in CACHES]
    for actual, torchs, true in pairs:  # the mean square for the reason that test_partial_forward gives
        found, allowed = (float((one.double() - true).square().mean().sqrt()) for one in (actual, torchs))
        assert found <= 1.1 * allowed + TOLERANCES[dtype] * float(true.abs().max()), f"{found:.3e}, {allowed:.3e}"


def one_step(dtype: torch.dtype, batch: int = 24) -> dict[str, Any]:
    """Of many sequences, with the full head and its logits."""
    args, make = draft_args(dtype, num_speculations=1, extend=False), Inputs(dtype, seed=1)
    args["seq_lens"], args["token"] = (make.integers(0, SIZES[bound], batch) for bound in "TV")
    args.update({name: make.normal(4, batch, *args[name].shape[2:]) for name in CACHES})
    head = {"head_weight": make.weight(SIZES["V"], SIZES["D"]), "token_map": None, "scale": None}
    return {**args, **head, "logits": torch.empty(batch, 1, SIZES["V"])}


def float64_step(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The state after layer E and the logits after the draft layers; the caches of ``args`` are written."""
    places = (args["k_cache"], args["v_cache"], args["cos"], args["sin"], args["seq_lens"])
    hidden, layers = args["embedding"][args["token"]][:, None], len(args["k_cache"])
    state = reference.partial_forward_ref(hidden, args["weights"][:EACH], *places, 0, 1, EPS)
    after = reference.partial_forward_ref(state, args["weights"][EACH:], *places, layers - 2, layers, EPS)
    return state[:, 0], reference.rms_norm_ref(after[:, 0], args["norm_weight"], EPS) @ args["head_weight"].T


def written(cache: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence's row of one layer at its length, [B, G, C]."""
    return torch.stack([cache[b, :, length] for b, length in enumerate(lengths.tolist())])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_native_op_is_the_composite_in_python(isa: str, dtype: torch.dtype) -> None:
    """With a threshold between the probabilities that occur, so that one sequence ends and one continues."""
    chances = run("draft", **draft_args(dtype)).probability[:, 0].sort().values
    args, other = (draft_args(dtype, draft_threshold=float(chances.mean())) for _ in range(2))
    ops = {op: getattr(torch.ops.layerskip_native, op) for op in ("partial_forward", "exit_head")}
    out = run("draft", **args)
    assert_same_draft(out, compose_draft(ops, *bind("draft", **other)))
    assert_same_bits([args[name] for name in CACHES], [other[name] for name in CACHES])
    assert (out.tokens[:, 0] < 0).sum() == 1


def test_a_batch_is_its_sequences_for_any_number_of_threads(isa: str) -> None:
    assert_threads_agree(lambda: tuple(run("draft", **draft_args(torch.bfloat16))))
    together = run("draft", **draft_args(torch.bfloat16))
    for b in range(SIZES["B"]):
        own = draft_args(torch.bfloat16)
        own.update({name: own[name][:, b : b + 1].contiguous() for name in CACHES})
        own.update({name: own[name][b : b + 1] for name in ("token", "seq_lens")})
        assert_same_bits(tuple(run("draft", **own)), tuple(one[b : b + 1] for one in together))


class Model:
    """A random decoder of L layers, whose exit after layer E and whose draft layers agree with it now and then."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        draw, make = random.Random(seed), Inputs(dtype, seed)
        self.num_layers, self.num_draft_layers = draw.randint(1, 4), draw.randint(1, 3)
        self.exit_layer, self.batch, self.num_slots = draw.randint(1, self.num_layers), draw.randint(1, 3), 4
        self.capacity = 32
        self.weights = [self._layer(make, 1.0) for _ in range(self.exit_layer)]
        self.weights += [self._layer(make, 0.4) for _ in range(self.num_layers - self.exit_layer)]
        self.draft_layers = [self._layer(make, 0.4) for _ in range(self.num_draft_layers)]
        self.slots = torch.tensor(draw.sample(range(self.num_slots), self.batch))
        self.seq_lens = torch.tensor([draw.randint(0, 5) for _ in range(self.batch)])
        layers = self.num_layers + self.num_draft_layers
        shape = (layers, self.num_slots, SIZES["G"], self.capacity, SIZES["C"])
        cos, sin = rope_tables(self.capacity, SIZES["C"])
        self.caches = {name: make.normal(*shape) for name in CACHES}
        self.common = {"cos": cos, "sin": sin, "embedding": make.normal(SIZES["V"], SIZES["D"]), "eps": EPS}
        self.common |= {"norm_weight": make.norm(SIZES["D"]), "head_weight": make.weight(SIZES["V"], SIZES["D"])}
        self.token = make.integers(0, SIZES["V"], self.batch)
        subset = torch.tensor(sorted(draw.sample(range(SIZES["V"]), 25)))
        int8 = make.integers(-99, 99, 25, SIZES["D"]).to(torch.int8)
        self.reduced = {
            "draft_head_weight": int8,
            "draft_token_map": subset,
            "draft_head_scale": torch.full((25,), 0.01),
        }
        self.own_norm = {"draft_norm_weight": make.norm(SIZES["D"])}

    @staticmethod
    def _layer(make: Inputs, scale: float) -> list[Tensor]:
        return [weight * scale if name in ("o", "down") else weight for name, weight in layer_weights(make).items()]

    def start(self, draft_layers: list[list[Tensor]], **changes: Any) -> dict[str, Any]:
        """The arguments of a round."""
        layers = self.num_layers + len(draft_layers)
        return {
            **self.common, **{name: cache[:layers].clone() for name, cache in self.caches.items()},
            "token": self.token, "weights": [weight for layer in self.weights + draft_layers for weight in layer],
            "seq_lens": self.seq_lens.clone(), "slots": self.slots, "exit_layer": self.exit_layer,
            "num_draft_layers": len(draft_layers), **changes,
        }  # fmt: skip

    def autoregressive(self, count: int) -> list[list[int]]:
        """The tokens of the whole model, one at a time."""
        args = self.start([], exit_layer=self.num_layers, num_speculations=count, extend=False)
        return run("draft", **args).tokens.tolist()


def decode(args: dict[str, Any], count: int) -> tuple[list[list[int]], list[int]]:
    """Each sequence's first ``count`` tokens, and how many each round accepted."""
    texts: list[list[int]] = [[] for _ in args["token"]]
    accepts: list[int] = []
    while min(map(len, texts)) < count and int(args["seq_lens"].max()) + args["num_speculations"] < 32:
        out = run("speculative_round", **args)
        for b, text in enumerate(texts):
            text += [*out.tokens[b, : out.accepted[b]].tolist(), int(out.next_token[b])]
        accepts += out.accepted.tolist()
        args["token"] = out.next_token
    return [text[:count] for text in texts], accepts


@pytest.mark.parametrize("seed", range(16))
def test_no_token_depends_on_the_draft_layers(isa: str, seed: int) -> None:
    """Random models, exits, draft layers, heads, K and thresholds: the tokens, and the model's own keys and values."""
    draw, dtype = random.Random(~seed), DTYPES[seed % len(DTYPES)]
    model, num_speculations = Model(seed, dtype), draw.randint(0, 4)
    options: dict[str, Any] = {"num_speculations": num_speculations}
    options.update(draw.choice([{}, model.reduced]))
    options.update(draw.choice([{}, model.own_norm]))
    zeros = torch.zeros(model.batch)
    options.update(draw.choice([{}, {"draft_threshold": 0.1}, {"temperature": zeros, "seed": zeros.long()}]))
    expected = model.autoregressive(12)
    plain, args = model.start([], **options), model.start(model.draft_layers, **options)
    texts = [decode(one, 12)[0] for one in (plain, args)]
    for text in texts:
        assert all(own == true[: len(own)] for own, true in zip(text, expected, strict=True))
        assert min(map(len, text)) >= 5
    for b, slot in enumerate(model.slots.tolist()):
        length = int(torch.minimum(plain["seq_lens"], args["seq_lens"])[b])
        for name in CACHES:
            own = [one[name][: model.num_layers, slot, :, :length] for one in (plain, args)]
            assert_same_bits(*own)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_draft_layers_that_are_the_models_deep_layers_are_always_right(isa: str, seed: int, sampled: bool) -> None:
    """Every draft of every round is accepted, and the draft layers' keys and values are those of the copied layers."""
    model = Model(seed + 100, DTYPES[seed % len(DTYPES)])
    exit_layer, num_layers = model.exit_layer, model.num_layers
    draws = {"temperature": torch.full((model.batch,), 0.8), "seed": torch.arange(model.batch)}
    args = model.start(model.weights[exit_layer:], num_speculations=3, **(draws if sampled else {}))
    for name in CACHES:
        args[name] = torch.cat([args[name][:num_layers], args[name][exit_layer:num_layers]])
    texts, accepts = decode(args, 12)
    assert accepts == [3] * len(accepts)
    if not sampled:
        assert texts == model.autoregressive(12)
    for b, slot in enumerate(model.slots.tolist()):
        for name in CACHES:
            written = args[name][:, slot, :, : args["seq_lens"][b]]
            assert_same_bits(written[num_layers:], written[exit_layer:num_layers])


def test_some_drafts_hold_and_some_do_not() -> None:
    """Otherwise `test_no_token_depends_on_the_draft_layers` would test nothing; draft layers change the drafts."""
    accepts, drafts = set(), []
    for seed in range(16):
        model = Model(seed, torch.float32)
        found = decode(model.start(model.draft_layers, num_speculations=2), 12)[1]
        accepts |= set(found)
        for draft_layers in ([], model.draft_layers):
            drafts.append(run("speculative_round", **model.start(draft_layers, num_speculations=2)).tokens.tolist())
    assert accepts == {0, 1, 2}
    assert any(plain != blocked for plain, blocked in zip(drafts[::2], drafts[1::2], strict=True))
