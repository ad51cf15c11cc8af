"""What only a GPU can show: a model's sizes, rounds captured in a graph, and that nothing waits for the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.reference import exit_head_ref

from ..common import Inputs, assert_as_good_as, assert_same_bits, double, run
from ..examples import example
from ..test_exit_head import arguments, eager
from .test_cuda_round import copied

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # set by benchmarks.gpu --sanitize; no allocation can be captured then


@contextmanager
def without_syncs() -> Iterator[None]:
    """An error where torch waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(args: dict[str, object]) -> dict[str, object]:
    moved = copied(args)
    moved["weights"] = [w.cuda() for w in args["weights"]]
    return {name: arg.cuda() if isinstance(arg, Tensor) else arg for name, arg in moved.items()}


@pytest.mark.parametrize("head", ["full", "int8 subset"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "vocab_size"), [(2048, 128256), (4096, 32000)])
def test_heads_of_models(width: int, vocab_size: int, dtype: torch.dtype, head: str) -> None:
    """Against float64; then one row, seven, sixteen and a second pass have the same bits."""
    hidden, norm, weight, eps, token_map, scale = (
        one.cuda() if isinstance(one, Tensor) else one for one in arguments(dtype, 17, width, vocab_size, head)
    )
    rest = (norm, weight, eps, token_map, scale)
    with lk.use_backend("cuda"):
        whole = lk.exit_head(hidden, *rest)
        for first, count in ((0, 1), (3, 7), (1, 16), (16, 1)):
            part = lk.exit_head(hidden[first : first + count], *rest)
            assert_same_bits(tuple(part), tuple(one[first : first + count] for one in whole))
    _, logit, logsumexp = exit_head_ref(*double([hidden, *rest]))
    same = eager([hidden, *rest])
    assert_as_good_as(whole.logit, same[0], logit, dtype)
    assert_as_good_as(whole.logsumexp, same[1], logsumexp, dtype)


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.skipif(os.environ.get(NO_CACHING) == "1", reason=f"{NO_CACHING} is set: a capture cannot allocate")
def test_a_round_is_captured(options: bool) -> None:
    """Replays of a graph go on from where the one before stopped, with the bits of eager rounds."""
    args = on_gpu(example("speculative_round", torch.bfloat16, options))
    theirs = copied(args)
    rounds = 2  # of up to K + 1 = 5 positions each, in a cache of 12
    with lk.use_backend("cuda"):
        expected = [run("speculative_round", *theirs.values()) for _ in range(rounds)]
        warm = copied(args)
        run("speculative_round", *warm.values())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run("speculative_round", *args.values())
        for one in expected:
            graph.replay()
            assert_same_bits(tuple(out), tuple(one))
    assert_same_bits(args["seq_lens"], theirs["seq_lens"])


@pytest.mark.parametrize("options", [False, True])
def test_nothing_waits_for_the_host(options: bool) -> None:
    args = on_gpu(example("speculative_round", torch.bfloat16, options))
    with lk.use_backend("cuda"), without_syncs():
        run("speculative_round", *args.values())


def test_samples_of_a_large_vocabulary() -> None:
    """Sums of 128256 terms on both sides; the accepted counts and tokens are the reference's."""
    make = Inputs(torch.float32, seed=6)
    batch, drafted, vocab_size, draft_vocab_size = 3, 4, 128256, 32000
    token_map = torch.randperm(vocab_size, generator=make.generator)[:draft_vocab_size]
    target = make.normal(batch, drafted + 1, vocab_size, scale=3.0)
    draft_logits = target[:, :drafted, token_map] + make.normal(batch, drafted, draft_vocab_size)
    draft = token_map[draft_logits.argmax(-1)]
    args = [
        draft, draft_logits, target, torch.tensor([5, 0, 9]), torch.tensor([0.8, 0.0, 1.2]), torch.tensor([1, 2, 3]),
        token_map,
    ]  # fmt: skip
    outs = []
    for backend in ("cuda", "reference"):
        moved = [one.cuda() for one in args]
        with lk.use_backend(backend):
            outs.append([one.tolist() for one in lk.accept_sampled(*moved)] + [moved[3].tolist()])
    assert outs[0] == outs[1]
