"""Bugs of the CUDA kernels."""

from __future__ import annotations

from .mutation import KERNELS, Mutation

CUDA, EMULATED = "csrc/cuda/", KERNELS + "cuda_ops/test_cuda_"

BUGS = [
    Mutation(
        "a draft that was not made is accepted, in CUDA", CUDA + "accept.cu",
        "own[count] >= 0 && ", "", EMULATED + "accept.py -k test_greedy",
    ),
    Mutation(
        "a block decides before its rows are merged, in CUDA", CUDA + "accept.cu",
        "merge_rows(a, b, rows);\n  __syncthreads();", "merge_rows(a, b, rows);",
        EMULATED + "accept.py -k test_sampled",
    ),
    Mutation(
        "every block of a sequence names the next token, in CUDA", CUDA + "accept.cu",
        "if (blockIdx.x == 0 && threadIdx.x == 0) {", "if (threadIdx.x == 0) {",
        EMULATED + "accept.py -k test_sampled",
    ),
    Mutation(
        "warps merge before all results are written, in CUDA", CUDA + "argmax_lse.cuh",
        "shared[threadIdx.x / 32] = own;\n  __syncthreads();", "shared[threadIdx.x / 32] = own;",
        EMULATED + "exit_head.py -k merge_takes",
    ),
    Mutation(
        "a stage of the head's weights is read one too early, in CUDA", CUDA + "exit_head.cu",
        "ptx::cp_async_wait<2>();", "ptx::cp_async_wait<3>();", EMULATED + "exit_head.py -k view_of_wider",
    ),
    Mutation(
        "every block takes all tiles of the head, in CUDA", CUDA + "head_states.cuh",
        "blocks(gridDim.x / a.passes),\n        block(blockIdx.x / a.passes),", "blocks(1),\n        block(0),",
        EMULATED + "exit_head.py -k merge_takes",
    ),
    Mutation(
        "rows past the vocabulary count, in CUDA", CUDA + "head_states.cuh",
        "if (row >= a.head.vocab_size || state >= rows) continue;", "if (state >= rows) continue;",
        EMULATED + "exit_head.py -k view_of_wider",
    ),
    Mutation(
        "states of a later group are normed as those of the first, in CUDA", CUDA + "head_states.cuh",
        "inverses[begin + threadIdx.x / 4] =", "inverses[threadIdx.x / 4] =", EMULATED + "exit_head.py -k many_rows",
    ),
    Mutation(
        "the sums of later states do not move up, in CUDA", CUDA + "head_states.cuh",
        "for (int i = 4; i < 8 * GROUPS; ++i)", "for (int i = 4; i < 8; ++i)", EMULATED + "exit_head.py -k many_rows",
    ),
    Mutation(
        "a pass over the head takes 16 states, in CUDA", CUDA + "head_states.cuh", "? kTokens : 4 * kTokens;",
        "? kTokens : kTokens;", "tests/tools/test_roofline.py -k states_share",
    ),
    Mutation(
        "a part of the states takes the place of one that is read, in CUDA", CUDA + "head_states.cuh",
        "        __syncthreads();  // all have read the previous part\n", "",
        EMULATED + "exit_head.py -k parts_of_states",
    ),
    Mutation(
        "the products of a warp's tiles do not take turns, in CUDA", CUDA + "head_states.cuh",
        "products[TILES - 1] = first;", "", EMULATED + "exit_head.py -k parts_of_states",
    ),
    Mutation(
        "the weights of a second part are those of the first, in CUDA", CUDA + "exit_head.cu",
        "at.part * a.width + column + piece", "column + piece", EMULATED + "exit_head.py -k parts_of_states",
    ),
    Mutation(
        "noise forgets the upper half of a position, in CUDA", CUDA + "noise.cuh",
        "static_cast<uint32_t>(position >> 32)", "0", EMULATED + "exit_head.py -k samples_match",
    ),
    Mutation(
        "a row does not see itself, in CUDA", CUDA + "attention_tile.cuh",
        "2 * t + j % 2 >= sees) one", "2 * t + j % 2 >= sees - 1) one",
        EMULATED + "verify_attention.py -k across_splits",
    ),
    Mutation(
        "eight splits are joined at most, in CUDA", CUDA + "verify_attention.cu",
        "begin < splits; begin += kBatch", "begin < min(splits, kBatch); begin += kBatch",
        EMULATED + "verify_attention.py -k every_split",
    ),
    Mutation(
        "a ticket orders nothing, in CUDA", CUDA + "verify_attention.cu",
        "ptx::ticket(ticket)", "atomicAdd(ticket, 1u)", EMULATED + "verify_attention.py -k every_split",
    ),
    Mutation(
        "the first block joins the splits, in CUDA", CUDA + "verify_attention.cu",
        "== gridDim.x - 1;", "== 0;", EMULATED + "verify_attention.py -k every_split",
    ),
    Mutation(
        "every block puts the ticket back, in CUDA", CUDA + "verify_attention.cu",
        "if (last) *ticket = 0;", "*ticket = 0;", EMULATED + "verify_attention.py -k every_split",
    ),
    Mutation(
        "the last block leaves its ticket, in CUDA", CUDA + "verify_attention.cu",
        "if (last) *ticket = 0;", "", EMULATED + "partial_forward.py -k depth_is_cut",
    ),
    Mutation(
        "a gate does not wait for the launches ahead, in CUDA", CUDA + "linear.cu",
        "ptx::dependency_wait();\n  stream.run();\n  const int row", "stream.run();\n  const int row",
        EMULATED + "partial_forward.py -k order_of_threads",
    ),
    Mutation(
        "32 bits for the place of a weight row, in CUDA", CUDA + "linear_tile.cuh",
        "matrix + static_cast<int64_t>(n) * in.d_in", "matrix + n * in.d_in",
        "tests/cuda_emulation/test_planted.py -k weights_beyond",
    ),
    Mutation(
        "a draft's later rows lie where its first does, in CUDA", CUDA + "common.h",
        "? length + ahead :", "? length :", EMULATED + "partial_forward.py -k later_in_a_draft",
    ),
    Mutation(
        "a draft ends at its threshold, in CUDA", CUDA + "draft.cu",
        "probability >= a.draft_threshold", "probability > a.draft_threshold",
        EMULATED + "round.py -k is_the_threshold_is_enough",
    ),
    Mutation(
        "a negative length is one inside the cache, in CUDA", CUDA + "common.h",
        "return 0 <= length && length <= capacity ?", "return length <= capacity ?",
        EMULATED + "rope_kv_append.py -k outside_the_cache",
    ),
]  # fmt: skip
