"""Bugs of the op library's Python."""

from __future__ import annotations

from .mutation import KERNELS, Mutation

DISPATCH, ROUNDS, CHECKS = (f"layerskip_kernels/{name}.py" for name in ("dispatch", "speculative", "_checks"))
DRAFT, ROUND = KERNELS + "test_draft.py", KERNELS + "test_speculative_round.py -k longest_draft"

BUGS = [
    Mutation(
        "triton before cuda", DISPATCH, '("cuda", "triton", "reference")', '("triton", "cuda", "reference")',
        KERNELS + "test_dispatch.py -k first_supporting",
    ),
    Mutation(
        "weights of layers may be strided", CHECKS, "dense(**{name: tensor})", "pass",
        KERNELS + "test_checks.py -k strides",
    ),
    Mutation(
        "a draft ends at its threshold, in Python", ROUNDS,
        "probability >= draft_threshold", "probability > draft_threshold",
        DRAFT + " -k threshold_is_enough",
    ),
    Mutation("as many rows as the shortest draft, in Python", ROUNDS, ".sum(1).max()", ".sum(1).min()", ROUND),
    Mutation("as many rows as the last draft, in Python", ROUNDS, ".sum(1).max()", ".sum(1)[-1]", ROUND),
    Mutation(
        "a row does not see itself, in the reference", "layerskip_kernels/reference.py",
        "<= positions[:, :, None]", "< positions[:, :, None]", KERNELS + "test_verify_attention.py -k sees_itself",
    ),
    Mutation(
        "int8 values are rounded with a scale that fp16 does not hold", "layerskip_kernels/formats.py",
        "scale = _rounded(largest / 127)", "scale = largest / 127",
        KERNELS + "test_formats.py -k headers_as_stored",
    ),
    Mutation(
        "values are rounded with a least value that fp16 does not hold", "layerskip_kernels/formats.py",
        "least = (low + inset).to(torch.float16).float()", "least = low + inset",
        KERNELS + "test_formats.py -k headers_as_stored",
    ),
    Mutation(
        "weights past the first part that is quantized are quantized as that", "layerskip_kernels/formats.py",
        "part = weight[first : first + step].float()", "part = weight[: len(weight[first : first + step])].float()",
        KERNELS + "test_formats.py -k in_several_chunks",
    ),
    Mutation(
        "draft layers do not read the last draft", ROUNDS,
        "hidden = layers(state, row,", "hidden = state if row == num_speculations else layers(state, row,",
        KERNELS + "test_draft_layers.py -k composition",
    ),
    Mutation(
        "second derivatives of the loss lack terms", "layerskip_kernels/_registration.py",
        'raise NotImplementedError(f"{ctx.op} is differentiable once: it has no second derivatives")',
        "return (None, None, *grads, *(None,) * (len(ctx.needs_input_grad) - 2 - len(grads)))",
        KERNELS + "test_early_exit_loss.py -k second_derivatives",
    ),
]  # fmt: skip
