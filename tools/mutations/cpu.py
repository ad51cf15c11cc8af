"""Bugs of the CPU kernels."""

from __future__ import annotations

from .mutation import KERNELS, Mutation

THREADS, DRAFT, ROUND, TILES = (
    f"{KERNELS}test_{name}.py" for name in ("thread_pool", "draft", "speculative_round", "tiles")
)

BUGS = [
    Mutation(
        "the shape of the tiles stays from the call before", "csrc/cpu/impl_tiles.h",
        "uint32_t sizes_ = 0;", "static inline thread_local uint32_t sizes_ = 0;", TILES,
    ),
    Mutation(
        "the last 24 columns of a tile are left out", "csrc/cpu/impl_tiles.h",
        "if (k < width) {", "if (width - k > 24) {", TILES,
    ),
    Mutation(
        "tiles have weight rows past the last", "csrc/cpu/impl_tiles.h",
        "const int64_t last = count - (GROUPS - 1) * kTileRows;", "const int64_t last = kTileRows;",
        TILES + " -k past_the_weight",
    ),
    Mutation(
        "tiles have activation rows past the last", "csrc/cpu/impl_tiles.h",
        "rows(smaller(kTileRows, x.rows - first))", "rows(kTileRows)", TILES,
    ),
    Mutation(
        "the configuration of tiles is left behind", "csrc/cpu/impl_tiles.h",
        "if (sizes_) release_tiles();", "", TILES,
    ),
    Mutation(
        "tiles sum even and odd products together", "csrc/cpu/tiles_emulated.h",
        "odd = without_denormals(odd + ", "even = without_denormals(even + ", TILES,
    ),
    Mutation(
        "attention sums 32 splits at most", "csrc/cpu/impl_attention.h",
        "s = 1; s < splits;", "s = 1; s < smaller(splits, 32);",
        KERNELS + "test_verify_attention.py -k combined_at_once",
    ),
    Mutation(
        "the 49th row of a matmul is the first", "csrc/cpu/impl_packed.h",
        "static_cast<const typename Dot<T>::X*>(x.data) + first * stride",
        "static_cast<const typename Dot<T>::X*>(x.data)",
        KERNELS + "test_linear.py -k many_rows",
    ),
    Mutation(
        "the 49th row of packed weights' product is the first", "csrc/cpu/impl_packed.h",
        "static_cast<const float*>(x.data) + first * stride", "static_cast<const float*>(x.data)",
        KERNELS + "test_formats.py -k test_linear",
    ),
    Mutation(
        "packed activations are zero padded one block too early", "csrc/cpu/impl_fixed.h",
        "k < padded_width; k += kBlock) store_block", "k + kBlock < padded_width; k += kBlock) store_block",
        KERNELS + "test_formats.py -k test_linear",
    ),
    Mutation(
        "NaN in a row of packed activations is a number", "csrc/cpu/impl_packed.h",
        "broken = fma(x, splat(0), broken);", "broken = splat(0);",
        KERNELS + "test_formats.py -k nan_stays",
    ),
    Mutation(
        "the high byte of an activation overflows", "csrc/cpu/panels_avx512.h",
        "127 * 256 + 127", "127 * 256 + 255", KERNELS + "test_interleaved.py -k largest_sums",
    ),
    Mutation(
        "eight-bit weights of a panel are 64 too large", "csrc/cpu/panels_avx512.h",
        "G::kBits == 8 ? 7 : 3", "G::kBits == 8 ? 6 : 3", KERNELS + "test_interleaved.py -k test_linear",
    ),
    Mutation(
        "a panel's rows of another processor are the first", "csrc/cpu/impl_packed.h",
        "lane = n % kPanelRows;", "lane = n % kPanelRows / kPanelRows;",
        KERNELS + "test_interleaved.py -k plain_by_the_native_kernel",
    ),
    Mutation(
        "a tile of the head begins within a panel", "csrc/cpu/head.h",
        "kPanelRows - 1) / kPanelRows * kPanelRows", "3) / 4 * 4",
        KERNELS + "test_interleaved.py -k test_exit_head",
    ),
    Mutation(
        "a draft ends at its threshold", "csrc/cpu/draft.cpp",
        "chance >= draft_threshold", "chance > draft_threshold", DRAFT + " -k threshold_is_enough",
    ),
    Mutation(
        "as many rows as the last draft", "csrc/cpu/speculative_round.cpp",
        "std::max<int64_t>(out,", "std::max<int64_t>(out * 0,", ROUND + " -k longest_draft",
    ),
    Mutation(
        "as many rows as the shortest draft", "csrc/cpu/speculative_round.cpp",
        "std::max<int64_t>(out,", "std::min<int64_t>(b == 0 ? num_speculations : out,", ROUND + " -k longest_draft",
    ),
    Mutation(
        "one draft too few is cleared", "csrc/cpu/draft.cpp",
        "for (int64_t i = first_row;", "for (int64_t i = first_row + 1;", DRAFT + " -k drafting_stops",
    ),
    Mutation(
        "the last of equal logits wins", "csrc/cpu/head.h",
        "if (other.max > best.max) best.row", "if (other.max >= best.max) best.row",
        KERNELS + "test_exit_head.py -k ties",
    ),
    Mutation(
        "lengths near 2^63 pass for lengths inside the cache", "csrc/cpu/common.h",
        "0 <= seq_lens[b] && seq_lens[b] <= capacity - rows", "seq_lens[b] >= 0 && seq_lens[b] + rows <= capacity",
        KERNELS + "test_limits.py -k outside_the_cache",
    ),
    Mutation(
        "equal slots that are not neighbours pass", "csrc/cpu/common.h",
        "other = 0; other < b;", "other = b > 0 ? b - 1 : 0; other < b;",
        KERNELS + "test_slots.py -k far_apart",
    ),
    Mutation(
        "a draft that was not made is accepted", "csrc/cpu/accept.cpp",
        "own[m] >= 0 && ", "", KERNELS + "test_accept_greedy.py",
    ),
    Mutation(
        "a row takes the splits of the last row", "csrc/cpu/attention.h",
        "(seq_lens[sequence] + m) / kSplit + 1", "(seq_lens[sequence] + rows - 1) / kSplit + 1",
        KERNELS + "test_verify_attention.py -k depend_on_each_other",
    ),
    Mutation(
        "a waiting worker spins forever", "csrc/cpu/thread_pool.h", "kSpinLimit{100}", "kSpinLimit{100000000}",
        THREADS + " -k spin_limit",
    ),
    Mutation(
        "a waiting worker sleeps at once", "csrc/cpu/thread_pool.h", "if (spin(phase)) return;", "",
        THREADS + " -k spin_limit",
    ),
    Mutation(
        "oversubscription is never detected", "csrc/cpu/thread_pool.h",
        "3 * slept > (num_workers", "3 * slept > 1000 * (num_workers", THREADS + " -k reduces",
    ),
    Mutation(
        "every call reduces the threads", "csrc/cpu/thread_pool.h", "3 * slept > (num_workers - 1) * elapsed", "true",
        THREADS + " -k reduces",
    ),
    Mutation(
        "the last worker at a barrier does not wake the others", "csrc/cpu/thread_pool.h",
        "& kSleepers) wake_all();", "& kSleepers) {\n      }", THREADS + " -k spin_limit",
    ),
    Mutation(
        "a sleeping worker polls", "csrc/cpu/thread_pool.h",
        "sleep_while(phase | kSleepers);", "(void)awake;", THREADS + " -k spin_limit",
    ),
    Mutation(
        "threads share the scratch memory", "csrc/cpu/common.h", "thread_local Buffer buffer;", "static Buffer buffer;",
        THREADS + " -k bits_of_one_thread",
    ),
    Mutation(
        "splits are joined before all are there", "csrc/cpu/attention.h",
        "attend_splits(worker);\n      worker.wait();\n", "attend_splits(worker);\n",
        KERNELS + "test_verify_attention.py -k joined_when_all",
    ),
    Mutation(
        "products begin before all rows are packed", "csrc/cpu/common.h",
        "  if (rows >= kFewRows) worker.wait();\n", "", KERNELS + "test_partial_forward.py -k threads_agree",
    ),
    Mutation(
        "rows are packed before all have attended", "csrc/cpu/attention.h",
        "attend_rows(worker, out);\n      worker.wait();\n", "attend_rows(worker, out);\n",
        KERNELS + "test_partial_forward.py -k threads_agree",
    ),
    Mutation(
        "splits are merged without the odd columns of a head's end", "csrc/cpu/impl_attention.h",
        "i < partial_pitch(head_dim);", "i < kPartialHead + head_dim;",
        KERNELS + "test_verify_attention.py -k row_counts",
    ),
    Mutation(
        "the last of an odd number of values is the one behind it", "csrc/cpu/impl_attention.h",
        "values.one(count - 1,", "values.two(count - 1,", KERNELS + "test_verify_attention.py -k row_counts",
    ),
]  # fmt: skip
