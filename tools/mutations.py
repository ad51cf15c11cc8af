"""The bugs that `tools.mutate` plants, each with the tests that are to catch it.

Each was made once, or is one that a rewrite could make. ``old`` stands in ``file`` once.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One planted bug; ``tests`` is what pytest gets."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def compiled(self) -> bool:
        """Whether the library must be built again; the tests of team.h and of the CUDA kernels compile them."""
        return self.file.startswith("csrc/cpu") and not self.file.endswith("team.h")


KERNELS, LAYERSKIP = "tests/kernels/", "tests/layerskip/"
DISPATCH, ROUNDS, CHECKS = (f"layerskip_kernels/{name}.py" for name in ("dispatch", "composition", "_checks"))
DECODING, TRAINING = "python/layerskip/decoding/", "python/layerskip/training/"
DRAFT, ROUND = KERNELS + "test_draft.py", KERNELS + "test_speculative_round.py"
PROMPTS, TRAINER = LAYERSKIP + "test_session_prompts.py", LAYERSKIP + "test_training_trainer.py"
TEAM, EXITS = KERNELS + "test_team.py", LAYERSKIP + "test_exit_decoding.py"
CUDA, EMULATED = "csrc/cuda/", KERNELS + "cuda_ops/test_cuda_"
TRITON, INTERPRETED = "layerskip_kernels/triton/", KERNELS + "triton_ops/cases/test_triton_"
MODELS = "python/layerskip/models/"
FAMILIES, KEPT = LAYERSKIP + "test_model_families.py", LAYERSKIP + "test_model_families_kept.py"
COMPOSED = MODELS + "composed_layer.py"
COMPILED = KERNELS + "triton_ops/compiled/test_triton_compile.py"

MUTATIONS = [
    Mutation(
        "triton before cuda", DISPATCH, '("cuda", "triton", "reference")', '("triton", "cuda", "reference")',
        KERNELS + "test_dispatch.py",
    ),
    Mutation(
        "weights of layers may be strided", CHECKS, "dense(**{name: tensor})", "pass",
        KERNELS + "test_checks.py -k strides",
    ),
    Mutation(
        "a draft ends at its threshold, in Python", ROUNDS, "chance >= draft_threshold", "chance > draft_threshold",
        DRAFT,
    ),
    Mutation("as many rows as the shortest draft, in Python", ROUNDS, ".sum(1).max()", ".sum(1).min()", ROUND),
    Mutation("as many rows as the last draft, in Python", ROUNDS, ".sum(1).max()", ".sum(1)[-1]", ROUND),
    Mutation(
        "a row does not see itself, in the reference", "layerskip_kernels/reference.py",
        "<= positions[:, :, None]", "< positions[:, :, None]", KERNELS + "test_verify_attention.py",
    ),
    Mutation(
        "an exit's blocks do not read prompts", DECODING + "reading.py",
        '"blocks": self.reads_blocks(reading)', '"blocks": False', EXITS + " -k torch_reads",
    ),
    Mutation(
        "an exit's blocks do not read what was looked up", DECODING + "batch.py",
        "read_blocks(self._model, self._cache, request.slot, request.all_tokens, request.blocks_done, position)",
        "pass", EXITS + " -k looked_up",
    ),
    Mutation(
        "an exit's blocks do not read what was looked up before a request continues it", DECODING + "slots.py",
        "if source.blocks_done < length:", "if False:", EXITS + " -k continued",
    ),
    Mutation(
        "an exit drafts on a row that its blocks have not read", DECODING + "slots.py",
        "if other.reading.depth < request.reading.depth:", "if False:", EXITS + " -k continued",
    ),
    Mutation(
        "a cancelled request keeps its slot", DECODING + "session.py",
        "self._leave_slot(request, keep and request.keep)", "del self._running[request.id]", PROMPTS,
    ),
    Mutation(
        "a cancelled request keeps its slot while it is read", DECODING + "line.py",
        "self._slots.give_back(request)", "pass", PROMPTS,
    ),
    Mutation(
        "a prompt is read in pieces that overlap", DECODING + "reading.py",
        "reading.done += rows", "reading.done += max(1, rows - 1)", PROMPTS,
    ),
    Mutation(
        "prompts have the time of the longest round", DECODING + "budget.py",
        "shortest = min(self._rounds)", "shortest = max(self._rounds)", LAYERSKIP + "test_budget.py",
    ),
    Mutation(
        "a step reads whatever its round took", DECODING + "budget.py",
        "(LONGEST_STEP + 1 - _GOAL) * shortest", "-math.inf", LAYERSKIP + "test_budget.py",
    ),
    Mutation(
        "a smaller pass is foreseen without its fixed cost", DECODING + "budget.py",
        "fixed = 0.0 if self._left >= self._seconds else min(self._rounds)", "fixed = 0.0",
        LAYERSKIP + "test_budget.py",
    ),
    Mutation(
        "pass after pass while any time is left", DECODING + "budget.py",
        "self._another = seconds\n", "self._another = 0.0\n", LAYERSKIP + "test_budget.py",
    ),
    Mutation(
        "a pass that took too long is tried again and again", DECODING + "budget.py",
        "while tokens > 1 and tokens in", "while False and tokens in", LAYERSKIP + "test_budget.py -k jumps",
    ),
    Mutation(
        "top-p of all tokens, not of those that top-k leaves", DECODING + "controls.py",
        "if self.top_k is not None:\n            logits = _keep_top_k(logits, self.top_k, self.largest_k)\n"
        "        if self.top_p is not None:\n            logits = _keep_top_p(logits, self.top_p)\n",
        "if self.top_p is not None:\n            logits = _keep_top_p(logits, self.top_p)\n"
        "        if self.top_k is not None:\n            logits = _keep_top_k(logits, self.top_k, self.largest_k)\n",
        LAYERSKIP + "test_sampling.py",
    ),
    Mutation(
        "a hole in a mask is padding", "python/layerskip/transformers/row_view.py",
        "first if first + self.length == len(padded) else -1", "first",
        LAYERSKIP + "test_transformers_generate.py -k hole",
    ),
    Mutation(
        "zero points that loading has converted are read as the file's", MODELS + "checkpoints/gptq.py",
        "kernel.qzero_format() == 2", "False", LAYERSKIP + "test_transformers_quantized.py",
    ),
    Mutation(
        "scales that change in place leave their packed copy as it is", MODELS + "watch.py",
        "self._weights if quantized else []", "[]", LAYERSKIP + "test_transformers_quantized.py",
    ),
    Mutation(
        "a kernel that has repacked its tensors is read", MODELS + "adaptation.py",
        "kind not in (*_PLAIN,", "False and (*_PLAIN,", LAYERSKIP + "test_transformers_quantized.py",
    ),
    Mutation(
        "a decoder keeps the depth of its model's configuration", MODELS + "watch.py",
        "_depth(model) == self._depth and ", "", LAYERSKIP + "test_model_changes.py -k that_are_called",
    ),
    Mutation(
        "a module of somebody's own class is taken for the model's", MODELS + "architectures.py",
        "if name and not kind", "if False and not kind", LAYERSKIP + "test_model_changes.py -k class_of_ones_own",
    ),
    Mutation(
        "a hole in a mask is taken out of a prompt", DECODING + "prompts.py",
        "kept[-1] - kept[0] + 1 != len(kept)", "False", f"{LAYERSKIP}test_prompts.py {LAYERSKIP}test_decoding.py",
    ),
    Mutation(
        "the data's epoch is always 0", TRAINING + "trainer.py",
        "set_epoch(int((state.epoch or 0) + 1e-6))", "set_epoch(0)", TRAINER + " -k epoch",
    ),
    Mutation(
        "a checkpoint does not say its sample of the head", TRAINING + "trainer.py",
        '            "head_sample": self.head_sample,\n', "", TRAINER + " -k another_plan",
    ),
    Mutation(
        "layer dropout one layer off", TRAINING + "dropout.py",
        "2 ** (layer / last) - 1", "2 ** ((layer + 1) / (last + 1)) - 1", LAYERSKIP + "test_training_formulas.py",
    ),
    Mutation(
        "every process learns the whole batch", TRAINING + "processes.py", "items[rank() :: count()]", "items[:]",
        LAYERSKIP + "test_train_exit_processes.py",
    ),
    Mutation(
        "drafts are accepted that the head lacks", TRAINING + "exit_loss.py",
        "torch.where(targets.ids >= 0, logs.gather", "torch.where(targets.ids >= -1, logs.gather",
        LAYERSKIP + "test_exit_loss.py",
    ),
    Mutation(
        "attention sums 32 splits at most", "csrc/cpu/impl_attention.h",
        "first < splits; first += 16", "first < smaller(splits, 32); first += 16",
        KERNELS + "test_verify_attention.py",
    ),
    Mutation(
        "the 49th row of a matmul is the first", "csrc/cpu/impl_packed.h",
        "static_cast<const typename Dot<T>::X*>(x.data) + first * stride",
        "static_cast<const typename Dot<T>::X*>(x.data)",
        KERNELS + "test_linear.py " + KERNELS + "test_exit_head.py " + KERNELS + "test_swiglu.py -k many_rows",
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
        KERNELS + "test_formats.py -k not_a_number",
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
        "chance >= draft_threshold", "chance > draft_threshold", DRAFT,
    ),
    Mutation(
        "as many rows as the last draft", "csrc/cpu/speculative_round.cpp",
        "std::max<int64_t>(out,", "std::max<int64_t>(out * 0,", ROUND,
    ),
    Mutation(
        "as many rows as the shortest draft", "csrc/cpu/speculative_round.cpp",
        "std::max<int64_t>(out,", "std::min<int64_t>(b == 0 ? num_speculations : out,", ROUND,
    ),
    Mutation(
        "one draft too few is cleared", "csrc/cpu/draft.cpp",
        "for (int64_t i = first_row;", "for (int64_t i = first_row + 1;", DRAFT,
    ),
    Mutation(
        "the last of equal logits wins", "csrc/cpu/head.h",
        "if (other.max > best.max) best.row", "if (other.max >= best.max) best.row", KERNELS + "test_exit_head.py",
    ),
    Mutation(
        "a draft that was not made is accepted", "csrc/cpu/accept_greedy.cpp",
        "own[count] >= 0 && ", "", KERNELS + "test_accept_greedy.py",
    ),
    Mutation(
        "a row takes the splits of the last row", "csrc/cpu/attention.h",
        "(seq_lens[sequence] + m) / kSplit + 1", "(seq_lens[sequence] + rows - 1) / kSplit + 1",
        KERNELS + "test_verify_attention.py",
    ),
    Mutation(
        "who waits spins for ever", "csrc/cpu/team.h", "kPatience{100}", "kPatience{100000000}", TEAM + " -k patience",
    ),
    Mutation("who waits sleeps at once", "csrc/cpu/team.h", "if (spin(phase)) return;", "", TEAM + " -k patience"),
    Mutation(
        "no team is ever smaller", "csrc/cpu/team.h", "3 * slept > (members", "3 * slept > 1000 * (members",
        TEAM + " -k smaller",
    ),
    Mutation(
        "every team is followed by a smaller one", "csrc/cpu/team.h", "3 * slept > (members - 1) * elapsed", "true",
        TEAM + " -k smaller",
    ),
    Mutation(
        "who arrives last wakes nobody", "csrc/cpu/team.h", "& kSleepers) wake_all();", "& kSleepers) {\n      }",
        TEAM + " -k patience",
    ),
    Mutation(
        "who sleeps goes round and round", "csrc/cpu/team.h",
        "sleep_while(phase | kSleepers);", "(void)awake;", TEAM + " -k patience",
    ),
    Mutation(
        "splits are joined before all are there", "csrc/cpu/attention.cpp",
        "step.attend(member);\n      member.wait();\n", "step.attend(member);\n",
        KERNELS + "test_verify_attention.py -k threads_agree",
    ),
    Mutation(
        "a draft that was not made is accepted, in CUDA", CUDA + "accept_greedy.cuh",
        "own[count] >= 0 && ", "", EMULATED + "accept.py -k test_greedy",
    ),
    Mutation(
        "a block decides before its rows are merged, in CUDA", CUDA + "accept_sampled.cuh",
        "merge_rows(a, b, rows);\n  __syncthreads();", "merge_rows(a, b, rows);",
        EMULATED + "accept.py -k test_sampled",
    ),
    Mutation(
        "warps merge before all have left their choice, in CUDA", CUDA + "choice.cuh",
        "shared[threadIdx.x / 32] = own;\n  __syncthreads();", "shared[threadIdx.x / 32] = own;",
        EMULATED + "exit_head.py -k merge_takes",
    ),
    Mutation(
        "a stage of the head's weights is read one too early, in CUDA", CUDA + "exit_head.cuh",
        "ptx::cp_async_wait<2>();", "ptx::cp_async_wait<3>();", EMULATED + "exit_head.py -k view_of_wider",
    ),
    Mutation(
        "rows past the vocabulary count, in CUDA", CUDA + "head_states.cuh",
        "if (row >= a.head.vocab_size || state >= rows) continue;", "if (state >= rows) continue;",
        EMULATED + "exit_head.py -k view_of_wider",
    ),
    Mutation(
        "noise forgets the upper half of a position, in CUDA", CUDA + "noise.cuh",
        "static_cast<uint32_t>(position >> 32)", "0", EMULATED + "exit_head.py -k samples_are",
    ),
    Mutation(
        "a row does not see itself, in CUDA", CUDA + "attention_tile.cuh",
        "2 * t + j % 2 >= sees) one", "2 * t + j % 2 >= sees - 1) one",
        EMULATED + "verify_attention.py -k across_splits",
    ),
    Mutation(
        "eight splits are joined at most, in CUDA", CUDA + "verify_attention.cuh",
        "begin < splits; begin += kBatch", "begin < min(splits, kBatch); begin += kBatch",
        EMULATED + "verify_attention.py -k every_split",
    ),
    Mutation(
        "the last block leaves its ticket, in CUDA", CUDA + "verify_attention.cuh",
        "if (last) *ticket = 0;", "", EMULATED + "partial_forward.py -k depth_is_cut",
    ),
    Mutation(
        "a gate does not wait for the launches ahead, in CUDA", CUDA + "linear.cuh",
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
        "return seq_lens[b] + ahead;", "return seq_lens[b];", EMULATED + "partial_forward.py -k later_in_a_draft",
    ),
    Mutation(
        "a draft ends at its threshold, in CUDA", CUDA + "draft.cuh",
        "probability >= a.draft_threshold", "probability > a.draft_threshold",
        EMULATED + "round.py -k is_the_threshold_is_enough",
    ),
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
        "noise takes the wrong half of a position, in Triton", TRITON + "_noise.py",
        "(offset >> 32).to(tl.uint32)", "(offset >> 31).to(tl.uint32)", INTERPRETED + "exit_head.py -k noise_is",
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
        "chance >= draft_threshold, token", "chance > draft_threshold, token",
        INTERPRETED + "draft.py -k is_the_threshold_is_enough",
    ),
    Mutation(
        "a kernel does not wait for those ahead, in Triton", TRITON + "_launch.py",
        "        tl_cuda.gdc_wait()\n", "", COMPILED + " -k every_launch and sm_90 and llama-1b-fp16",
    ),
    Mutation(
        "drafts behind the end of a sequence are counted", DECODING + "sequence.py",
        "tuple(drafts[: self.remaining])", "tuple(drafts)", LAYERSKIP + "test_records.py -k in_batches",
    ),
    Mutation(
        "what was looked up counts as drafted by a layer", DECODING + "session.py",
        "0 if request.looked_up is not None else kind.exit_layer", "kind.exit_layer",
        LAYERSKIP + "test_records.py -k told_once",
    ),
    Mutation(
        "the draft after the last accepted one is not decided", DECODING + "output.py",
        "min(self.emitted, len(self.drafts))", "self.accepted", LAYERSKIP + "test_sources.py -k by_position",
    ),
    Mutation(
        "a prompt is taken for markup", "python/layerskip/cli/page/markup.py", "escape(str(child))", "str(child)",
        LAYERSKIP + "test_report.py -k is_text",
    ),
    Mutation(
        "a round's own token is left out of the page", "python/layerskip/cli/page/tokens.py",
        'if one["emitted"] == accepted:', 'if one["emitted"]:', LAYERSKIP + "test_report.py -k every_token",
    ),
    Mutation(
        "a window is one position too long", COMPOSED, "positions - window + 1", "positions - window",
        FAMILIES + " -k long_texts and gemma3",
    ),
    Mutation(
        "the activation of several rows at once", COMPOSED, "not x.is_cpu or not len(x)", "len(x) >= 0",
        FAMILIES + " -k rows_bits and gemma3",
    ),
    Mutation(
        "a layer without rotary embedding has one", MODELS + "form.py", "0 if uses else 1 for uses", "0 for uses",
        FAMILIES + " -k every_split and smollm3",
    ),
    Mutation(
        "eps does not follow the scale of the states", MODELS + "form.py", "config.rms_norm_eps / residual**2",
        "config.rms_norm_eps / residual", FAMILIES + " -k small_states",
    ),
    Mutation(
        "norms are computed from the weights of the first call", MODELS + "composed.py",
        "for name, weight in self.held(number).items():", "for name, weight in ():",
        KEPT + " -k change_in_place and gemma3",
    ),
    Mutation(
        "the final norm is that of the first call", MODELS + "model.py", "        self.head.refresh()\n", "",
        KEPT + " -k change_in_place and granite",
    ),
    Mutation(
        "views of joined matrices stay where they were", MODELS + "layers.py",
        "not JOINED.keys().isdisjoint(first)", "False", KEPT + " -k other_memory and phi3",
    ),
    Mutation(
        "positions past a window are computed", MODELS + "rotary.py", "cos[most:] = torch.nan", "pass",
        KEPT + " -k give_no_token",
    ),
    Mutation(
        "experts share more than 1", COMPOSED, "    if layout.shares:\n", "    if not layout.shares:\n",
        FAMILIES + " -k every_split and qwen3moe",
    ),
]  # fmt: skip
