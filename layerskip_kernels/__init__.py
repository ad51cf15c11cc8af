"""Fused kernels for early exit and self-speculative decoding."""

from . import cpu_loss, dispatch, layers, reference, triton  # all but layers, and _extension, register implementations
from ._extension import cpu_isa, multiplies_panels, set_cpu_isa
from .dispatch import BackendError, Explanation, explain, use_backend
from .functional import (
    early_exit_loss,
    exit_head,
    linear,
    partial_forward,
    rms_norm,
    rope_kv_append,
    swiglu,
    verify_attention,
)
from .schemas import (
    Acceptance,
    Draft,
    EarlyExitLossOutput,
    ExitOutput,
    Head,
    KVCache,
    LayerWeights,
    Noise,
    Round,
)
from .speculative import accept_greedy, accept_sampled, draft, speculative_round

__version__ = "0.1.0"

__all__ = [
    "Acceptance",
    "BackendError",
    "Draft",
    "EarlyExitLossOutput",
    "ExitOutput",
    "Explanation",
    "Head",
    "KVCache",
    "LayerWeights",
    "Noise",
    "Round",
    "__version__",
    "accept_greedy",
    "accept_sampled",
    "cpu_isa",
    "cpu_loss",
    "dispatch",
    "draft",
    "early_exit_loss",
    "exit_head",
    "explain",
    "layers",
    "linear",
    "multiplies_panels",
    "partial_forward",
    "reference",
    "rms_norm",
    "rope_kv_append",
    "set_cpu_isa",
    "speculative_round",
    "swiglu",
    "triton",
    "use_backend",
    "verify_attention",
]
