"""With ``--load-format layerskip``, vLLM's draft model is the model itself."""

from __future__ import annotations

import functools
import sys
from typing import Any

from .settings import LOAD_FORMAT, Settings

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ALLOWED = (
    "method", "model", "num_speculative_tokens", "num_speculative_tokens_per_batch_size", "draft_tensor_parallel_size",
    "draft_sample_method", "rejection_sample_method", "use_local_argmax_reduction", "enforce_eager",
)  # fmt: skip
"""Keys of ``--speculative-config`` that apply to a drafter made of the target's first layers."""


def install() -> None:
    """Let `EngineArgs` fill in the speculative configuration of engines with the load format.

    A process that has not imported it is a worker, which receives a complete configuration.
    """
    arguments: Any = sys.modules.get("vllm.engine.arg_utils")
    if arguments is None:
        return
    plain = arguments.EngineArgs.create_speculative_config

    @functools.wraps(plain)
    def create(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        if self.load_format == LOAD_FORMAT:
            _check(self, target_model_config, target_parallel_config)
            self.speculative_config = _speculation(self, target_model_config)
            from vllm.platforms import current_platform

            if current_platform.is_cpu():
                from .sampling import refuse

                refuse()
        return plain(self, target_model_config, target_parallel_config)

    arguments.EngineArgs.create_speculative_config = create


def _check(args: Any, model_config: Any, parallel_config: Any) -> None:
    """Refuse unsupported options by name, before any process is started."""
    problem = None
    if not set(ARCHITECTURES) & set(model_config.architectures):
        problem = f"architecture {', '.join(model_config.architectures)}; it knows {', '.join(ARCHITECTURES)}"
    elif parallel_config.pipeline_parallel_size > 1:
        problem = "pipeline parallelism: the first layers and the head are on different ranks; use tensor parallelism"
    elif args.enable_lora:
        problem = "LoRA at run time; merge the adapter into the model (layerskip export)"
    elif parallel_config.use_ubatching:
        problem = "dual batch overlap"
    elif args.kv_sharing_fast_prefill:
        problem = "--kv-sharing-fast-prefill"
    elif getattr(model_config.hf_config, "sliding_window", None) and not model_config.disable_sliding_window:
        problem = "a sliding window; --disable-sliding-window turns it off"
    if problem is not None:
        raise NotImplementedError(f"--load-format {LOAD_FORMAT} does not support {problem}")


def _speculation(args: Any, model_config: Any) -> dict[str, Any]:
    """Complete the user's speculative configuration; flags of `EngineArgs` such as --spec-tokens count as its keys."""
    given = {name.replace("-", "_"): value for name, value in (args.speculative_config or {}).items()}
    flags = {"method": args.spec_method, "model": args.spec_model, "num_speculative_tokens": args.spec_tokens}
    said = {**given, **{name: value for name, value in flags.items() if value is not None}}
    _check_speculation(said, model_config.model)
    settings = Settings.of(args.model_loader_extra_config or {}, model_config.hf_config, model_config.model)
    defaults = {
        "method": "draft_model",
        "model": model_config.model,
        "num_speculative_tokens": settings.num_speculations,
        "use_local_argmax_reduction": said.get("draft_sample_method") != "probabilistic",
    }
    if "num_speculative_tokens" in said and "num_speculations" in (args.model_loader_extra_config or {}):
        raise ValueError("num_speculations and num_speculative_tokens name the same thing; give one")
    return {**{name: value for name, value in defaults.items() if name not in said}, **given}


def _check_speculation(said: dict[str, Any], model: str) -> None:
    unknown = sorted(set(said) - set(ALLOWED) - {"target_model_config", "target_parallel_config"})
    if unknown:
        raise ValueError(
            f"--load-format {LOAD_FORMAT} drafts with the model's own layers, so speculative_config cannot hold "
            f"{', '.join(unknown)}; it takes {', '.join(ALLOWED)}"
        )
    if said.get("method", "draft_model") != "draft_model":
        raise ValueError(
            f"--load-format {LOAD_FORMAT} is speculation by a draft model, not by {said['method']!r}: vLLM takes one "
            "method, so n-grams and an exit cannot be combined"
        )
    if said.get("model", model) != model:
        raise ValueError(f"--load-format {LOAD_FORMAT} drafts with {model} itself, not with {said['model']}")
