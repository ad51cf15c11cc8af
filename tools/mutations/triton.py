"""Bugs of the Triton kernels."""

from __future__ import annotations

from .mutation import KERNELS, Mutation

TRITON, INTERPRETED = "layerskip_kernels/triton/", KERNELS + "triton_ops/cases/test_triton_"
COMPILED = KERNELS + "triton_ops/compiled/test_triton_compile.py"

BUGS = [
    Mutation(
        "a row does not see itself, in Triton", TRITON + "verify_attention.py",
        "at[None, :] <= position[:, None]", "at[None, :] < position[:, None]",
        INTERPRETED + "attention.py -k slots_agree",
    ),
    Mutation(
        "the last piece of a context is not joined, in Triton", TRITON + "verify_attention.py",
        "position // SPLIT + 1, 0)", "position // SPLIT, 0)", INTERPRETED + "attention.py -k slots_agree",
    ),
    Mutation(
        "rows past the vocabulary count, in Triton", TRITON + "exit_head.py",
        "tl.where(col_ok[None, :], logits, float(\"-inf\"))", "tl.where(col_ok[None, :], logits, 0.0)",
        INTERPRETED + "exit_head.py -k over_many_tiles",
    ),
    Mutation(
        "noise takes the wrong half of a position, in Triton", TRITON + "_device.py",
        "(offset >> 32).to(tl.uint32)", "(offset >> 31).to(tl.uint32)", INTERPRETED + "exit_head.py -k noise_matches",
    ),
    Mutation(
        "pieces of a product lie on each other, in Triton", TRITON + "linear.py",
        "tl.program_id(2).to(tl.int64) * rows * outputs", "tl.program_id(2).to(tl.int64) * outputs",
        INTERPRETED + "rows.py -k split_over_its_depth",
    ),
    Mutation(
        "half of a rotation turns back, in Triton", TRITON + "rope_kv_append.py",
        "tl.fma(b, cos, a * sin)", "tl.fma(b, cos, -(a * sin))", INTERPRETED + "attention.py -k of_strided_rows",
    ),
    Mutation(
        "a draft that was not made is accepted, in Triton", TRITON + "accept_greedy.py",
        "(drafts == targets) & (drafts >= 0)", "drafts == targets", INTERPRETED + "rows.py -k on_every_draft",
    ),
    Mutation(
        "a draft ends at its threshold, in Triton", TRITON + "draft.py",
        "probability >= draft_threshold, token", "probability > draft_threshold, token",
        INTERPRETED + "draft.py -k is_the_threshold_is_enough",
    ),
    Mutation(
        "a kernel does not wait for those ahead, in Triton", TRITON + "_launch.py",
        "        tl_cuda.gdc_wait()\n", "", COMPILED + " -k every_launch and sm_90 and llama-1b-fp16",
    ),
    Mutation(
        "a negative length is one inside the cache, in Triton", TRITON + "rope_kv_append.py",
        "(length >= 0) & (length <= capacity)", "length <= capacity", INTERPRETED + "attention.py -k outside_the_cache",
    ),
]  # fmt: skip
