"""Fused kernels for early exit and self-speculative decoding."""

from . import dispatch, reference
from ._extension import cpu_isa, set_cpu_isa
from ._registry import register_all
from .dispatch import BackendError, Explanation, explain, use_backend
from .functional import (
    Acceptance,
    Draft,
    EarlyExitLossOutput,
    ExitOutput,
    Round,
    accept_greedy,
    accept_sampled,
    draft,
    early_exit_loss,
    exit_head,
    linear,
    partial_forward,
    rms_norm,
    rope_kv_append,
    speculative_round,
    swiglu,
    verify_attention,
)

register_all()

__all__ = [
    "Acceptance",
    "BackendError",
    "Draft",
    "EarlyExitLossOutput",
    "ExitOutput",
    "Explanation",
    "Round",
    "accept_greedy",
    "accept_sampled",
    "cpu_isa",
    "dispatch",
    "draft",
    "early_exit_loss",
    "exit_head",
    "explain",
    "linear",
    "partial_forward",
    "reference",
    "rms_norm",
    "rope_kv_append",
    "set_cpu_isa",
    "speculative_round",
    "swiglu",
    "use_backend",
    "verify_attention",
]
