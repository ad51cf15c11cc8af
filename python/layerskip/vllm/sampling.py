"""Sampling with speculation on CPUs, where vLLM 0.32 loses the temperatures, top-k and top-p of speculative rows.

``vllm.utils.cpu_triton_utils._expand_kernel_impl`` writes into an int64 copy of its output, which is not copied back.
With any draft model, sampled text is garbage. So sampling is refused, unless the function that calls it is replaced.
GPUs are not affected. A second defect stops the engine: in a step without drafts, top-k takes the maximum of nothing.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


def refuse() -> None:
    """Refuse requests with a temperature in engines with the layerskip load format."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    from .settings import LOAD_FORMAT, split

    if hasattr(InputProcessor._validate_params, "__wrapped__"):
        return
    plain = InputProcessor._validate_params

    @functools.wraps(plain)
    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        load = self.vllm_config.load_config
        ours = load.load_format == LOAD_FORMAT
        mended = ours and split(load.model_loader_extra_config)[0].get("mend_cpu_sampling", False)
        if ours and not mended and isinstance(params, SamplingParams) and params.temperature > 0:
            raise VLLMValidationError(
                f"temperature is {params.temperature}, but vLLM 0.32 loses it on CPUs where tokens are drafted "
                "(cpu_triton_utils._expand_kernel_impl writes into a copy). Ask for temperature 0, or start vLLM with "
                """--model-loader-extra-config '{"mend_cpu_sampling": true}'""",
                parameter="temperature",
                value=params.temperature,
            )
        return plain(self, params, *args, **kwargs)

    InputProcessor._validate_params = validate


def mend() -> None:
    """Make this process's rejection sampler expand with torch, and skip steps without drafts."""
    from vllm.v1.sample import rejection_sampler

    if rejection_sampler.expand_batch_to_tokens is _expand:
        return
    plain = rejection_sampler.apply_sampling_constraints

    @functools.wraps(plain)
    def constrain(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return plain(logits, *args, **kwargs) if logits.shape[0] else logits

    rejection_sampler.expand_batch_to_tokens = _expand
    rejection_sampler.apply_sampling_constraints = constrain


def _expand(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """Repeat a value per request [B] for each of its tokens [R]; ``cu_num_tokens`` [B] are cumulative token counts."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)
