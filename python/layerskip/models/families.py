"""The table of the supported architectures: what transformers calls them, and how their layers differ from Llama's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .form import (
    Form,
    gemma3,
    gemma_norm,
    granite,
    granite_norm,
    llama,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen3_moe,
    smollm3,
)
from .head import NormForm
from .rotary import LONG, STATIC

# How layers are computed.
ONE_CALL = "one call for a round"
RUNS = "one call for layers in a row"
COMPOSED = "composed of small ops"
ACTIVATIONS = ("silu", "swish")  # two names of one function

# The paths of a layer's weights within the layer, by the names that the decoder holds them by.
_NORMS = {"attn_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
_ATTENTION = {name: f"self_attn.{name}_proj.weight" for name in "qkvo"}
_MLP = {name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
LAYER_PATHS = _NORMS | _ATTENTION | _MLP
QKV_BIAS = {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
QK_NORM = {f"{name}_norm": f"self_attn.{name}_norm.weight" for name in "qk"}
_JOINED = _NORMS | {
    "qkv": "self_attn.qkv_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate_up": "mlp.gate_up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_EXPERTS = {
    "router": "mlp.gate.weight",
    "experts_in": "mlp.experts.gate_up_proj",
    "experts_out": "mlp.experts.down_proj",
}
_POST_NORMS = {
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}
_FOUR_NORMS = _POST_NORMS | {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
}


@dataclass(frozen=True)
class Architecture:
    """A ``model_type`` of transformers.

    Attributes
    ----------
    title : str
        What people call its models.
    model_class : str
    layer_paths : dict
        The paths of a layer's weights, by the names that a decoder holds them by.
    differs : str
        From Llama, in words.
    speed : str
        `ONE_CALL`, `RUNS` or `COMPOSED`.
    form : callable
        (configuration, module of the rotary embedding) -> `Form`.
    final_norm : callable or None
        Configuration -> `NormForm`.
    rope_types : tuple of str
    partial_rotary : bool
        Whether a head may have values that are not rotated.
    activations : tuple of str
    embedding_class : str
        The model's own class of an embedding, if it is not torch's; its factor is in `Form`.
    only : dict
        Options of the configuration, with the values that they may have.
    """

    title: str
    model_class: str
    layer_paths: dict[str, str]
    differs: str = ""
    speed: str = ONE_CALL
    form: Callable[[Any, Any], Form] = llama
    final_norm: Callable[[Any], NormForm] | None = None
    rope_types: tuple[str, ...] = STATIC
    partial_rotary: bool = False
    activations: tuple[str, ...] = ACTIVATIONS
    embedding_class: str = ""
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture("Llama 2, 3, 3.x and SmolLM2", "LlamaForCausalLM", LAYER_PATHS),
    "mistral": Architecture("Mistral", "MistralForCausalLM", LAYER_PATHS, "a sliding window in some"),
    "qwen2": Architecture("Qwen2, Qwen2.5", "Qwen2ForCausalLM", LAYER_PATHS | QKV_BIAS, "biases of q, k and v"),
    "qwen3": Architecture("Qwen3", "Qwen3ForCausalLM", LAYER_PATHS | QK_NORM, "norms of q and k"),
    "phi3": Architecture(
        "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini", "Phi3ForCausalLM", _JOINED,
        "q, k and v are one matrix, gate and up another; longrope; in Phi-4-mini some values of a head are not rotated",
        f"{ONE_CALL}; Phi-4-mini {COMPOSED}", phi3, rope_types=(*STATIC, LONG), partial_rotary=True,
    ),
    "smollm3": Architecture(
        "SmolLM3", "SmolLM3ForCausalLM", LAYER_PATHS, "some layers without rotary embedding", RUNS, smollm3
    ),
    "granite": Architecture(
        "Granite 3.x", "GraniteForCausalLM", LAYER_PATHS,
        "factors of embedding, attention, residuals and logits", RUNS, granite, granite_norm,
    ),
    "olmo2": Architecture(
        "OLMo 2", "Olmo2ForCausalLM", _ATTENTION | QK_NORM | _POST_NORMS | _MLP,
        "norms after attention and feed-forward, none before; norms of q and k over all heads", COMPOSED, olmo2,
    ),
    "olmo3": Architecture(
        "OLMo 3", "Olmo3ForCausalLM", _ATTENTION | QK_NORM | _POST_NORMS | _MLP,
        "as OLMo 2; sliding windows; two rotary embeddings", COMPOSED, olmo3,
    ),
    "gemma3_text": Architecture(
        "Gemma 3 text", "Gemma3ForCausalLM", _ATTENTION | QK_NORM | _FOUR_NORMS | _MLP,
        "norms before and after, kept less 1; GELU; sliding windows; two rotary embeddings; a factor of the embedding",
        COMPOSED, gemma3, gemma_norm, activations=("gelu_pytorch_tanh",),
        embedding_class="transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding",
        only={
            "final_logit_softcapping": (None,), "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
    ),
    "mixtral": Architecture(
        "Mixtral", "MixtralForCausalLM", _NORMS | _ATTENTION | _EXPERTS, "experts", COMPOSED, mixtral
    ),
    "qwen3_moe": Architecture(
        "Qwen3-MoE", "Qwen3MoeForCausalLM", _NORMS | _ATTENTION | QK_NORM | _EXPERTS,
        "experts; norms of q and k", COMPOSED, qwen3_moe,
        only={"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
    ),
}  # fmt: skip


def norm_form_of(config: Any) -> NormForm | None:
    """How the final norm of a model is kept, if not as the ops take it."""
    final_norm = ARCHITECTURES[config.model_type].final_norm
    return None if final_norm is None else final_norm(config)


def supported_architectures() -> list[str]:
    """The supported values of ``model_type``, each with what people call it."""
    return [f"{model_type} ({architecture.title})" for model_type, architecture in ARCHITECTURES.items()]
