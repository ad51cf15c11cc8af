"""draft against the ops that it is made of, bit for bit."""

from __future__ import annotations

import pytest
import torch
from triton_cases import on_backend, same_bits

import layerskip_kernels as lk
from tests.kernels.examples import example


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_draft_is_its_steps(dtype: torch.dtype, device: torch.device) -> None:
    args = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in example("draft", dtype).items()
    }
    args["weights"] = [weight.to(device) for weight in args["weights"]]
    args["steps"] = 2
    drafted, _ = on_backend("triton", lk.draft, *args.values())
    token, head = args["token"], [args[name] for name in ("norm_weight", "head_weight", "eps", "token_map", "scale")]
    for row in range(3):
        hidden = args["embedding"][token][:, None]
        layers = [args[name] for name in ("weights", "k_cache", "v_cache", "cos", "sin")]
        with lk.use_backend("triton"):
            hidden = lk.partial_forward(hidden, *layers, args["seq_lens"] + row, 0, args["end"], args["eps"])
            token = lk.exit_head(hidden[:, 0], *head).token
        same_bits(drafted.states[:, row], hidden[:, 0])
        if row < 2:
            same_bits(drafted.tokens[:, row], token)
