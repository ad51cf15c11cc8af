"""Supported architectures: the table, checks of Hugging Face models, and the parts built of their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoints.hf import method_of
from .files import EMBEDDING, FLOATS, HEAD, LAYERS, NORM, ModelFileError, without_leftovers
from .generic_layers import LayerConfig
from .head import EarlyExitHead, NormSpec
from .hf_checks import (
    UnsupportedModelError,
    check_one_device,
    class_of,
    has_lora,
    lora_is_active,
    plain_modules,
    unsupported,
)
from .layers import PartialDepthDecoder
from .rotary import LONG, Rotary, exact_module, max_positions, rope_parameters, rotary_of, rotations

if TYPE_CHECKING:
    from .model import LayerSkipModel

# How layers are computed.
ONE_CALL = "one call a round"
RUNS = "one call for consecutive layers"
COMPOSED = "small ops"
ACTIVATIONS = ("silu", "swish")  # two names of one function
STATIC = ("default", "llama3", "linear", "yarn")  # types of RoPE whose frequencies do not depend on the length


def llama(config: Any, module: Any) -> LayerConfig:
    """Pre-norm layers with one rotary embedding."""
    return LayerConfig(config.rms_norm_eps, (rotary_of(module),), max_positions=max_positions(config))


def smollm3(config: Any, module: Any) -> LayerConfig:
    """Some layers without rotary embedding, that is with frequencies of 0."""
    rotary = rotary_of(module)
    none = Rotary(torch.zeros_like(rotary.inv_freq), 1.0)
    which = tuple(0 if uses else 1 for uses in config.no_rope_layers[: config.num_hidden_layers])
    return replace(llama(config, module), rotaries=(rotary, none), rotary_index=which)


def granite(config: Any, module: Any) -> LayerConfig:
    """Factors of embedding, attention, residuals and logits.

    With the residual's factor r and states that are all divided by r, a layer is h + f(norm(h)) as Llama's: a norm
    ignores the scale of its input except in eps, which becomes eps / r². The attention's factor goes into the rotary
    tables, whose square multiplies the scores.
    """
    residual, scores = config.residual_multiplier, config.attention_multiplier
    for name, factor in (("residual_multiplier", residual), ("attention_multiplier", scores)):
        if factor <= 0:
            raise unsupported(f"{name} {factor}", "a factor above 0")
    return replace(
        llama(config, module),
        eps=config.rms_norm_eps / residual**2,
        rotaries=(_scaled(rotary_of(module), scores),),
        embedding_scale=config.embedding_multiplier / residual,
    )


def olmo2(config: Any, module: Any) -> LayerConfig:
    """Norms after attention and feed-forward, and over the whole width of q and k."""
    return replace(llama(config, module), fused=False)


def olmo3(config: Any, module: Any) -> LayerConfig:
    """OLMo 2 with windows in some layers, which have a rotary embedding of their own."""
    rotaries, which, windows = _by_layer_type(config, module)
    return LayerConfig(config.rms_norm_eps, rotaries, which, fused=False, windows=windows)


def gemma3(config: Any, module: Any) -> LayerConfig:
    """Four norms a layer, whose weights are stored less 1; two rotary embeddings; windows; GELU."""
    rotaries, which, windows = _by_layer_type(config, module)
    return LayerConfig(
        config.rms_norm_eps,
        tuple(_scaled(rotary, config.query_pre_attn_scalar**-0.5) for rotary in rotaries),
        which,
        embedding_scale=config.hidden_size**0.5,
        round_embedding_scale=True,
        fused=False,
        norm_offset=1.0,
        gelu=True,
        windows=windows,
    )


def mixtral(config: Any, module: Any) -> LayerConfig:
    """Experts instead of the feed-forward; Qwen3-MoE may leave their weights as they are."""
    normalize = bool(getattr(config, "norm_topk_prob", True))
    experts = config.num_experts_per_tok
    return replace(llama(config, module), fused=False, experts_per_token=experts, normalize_experts=normalize)


def phi3(config: Any, module: Any) -> LayerConfig:
    """Llama's layers, maybe with only some values of a head rotated."""
    made = llama(config, module)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary_dim = 2 * made.rotaries[0].inv_freq.numel()
    if rotary_dim == size:
        return made
    return replace(made, rotaries=(rotations(made.rotaries[0], size),), fused=False, rotary_dim=rotary_dim)


def granite_norm(config: Any) -> NormSpec:
    """The factor of the logits goes into the final norm."""
    return NormSpec(0.0, 1 / config.logits_scaling)


def _by_layer_type(config: Any, module: Any) -> tuple[tuple[Rotary, ...], tuple[int, ...], tuple[int | None, ...]]:
    """Rotary embeddings, the index of each layer's, and its window, for configurations with ``layer_types``."""
    if not hasattr(config, "rope_parameters"):
        raise unsupported(f"model_type {config.model_type!r} with a transformers older than 5", "transformers 5")
    kinds = sorted(set(config.layer_types))
    windows = tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
    rotaries = tuple(rotary_of(module, f"{kind}_") for kind in kinds)
    return rotaries, tuple(map(kinds.index, config.layer_types)), windows


def _scaled(rotary: Rotary, factor: float) -> Rotary:
    """A rotary embedding that multiplies q · k by ``factor``, instead of by C^-½ as the ops do."""
    size = 2 * rotary.inv_freq.numel()
    return rotary._replace(scaling=rotary.scaling * math.sqrt(factor * math.sqrt(size)))


# The paths of a layer's weights within the layer, by the decoder's names.
_NORMS = {"attn_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
_ATTENTION = {name: f"self_attn.{name}_proj.weight" for name in "qkvo"}
_MLP = {name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
LAYER_PATHS = _NORMS | _ATTENTION | _MLP
QKV_BIAS = {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
QK_NORM = {f"{name}_norm": f"self_attn.{name}_norm.weight" for name in "qk"}
_JOINED = _NORMS | {
    "qkv": "self_attn.qkv_proj.weight", "o": "self_attn.o_proj.weight",
    "gate_up": "mlp.gate_up_proj.weight", "down": "mlp.down_proj.weight",
}  # fmt: skip
_EXPERTS = {
    "router": "mlp.gate.weight", "experts_in": "mlp.experts.gate_up_proj", "experts_out": "mlp.experts.down_proj",
}  # fmt: skip
_POST_NORMS = {
    "attn_post_norm": "post_attention_layernorm.weight", "mlp_post_norm": "post_feedforward_layernorm.weight",
}  # fmt: skip
_FOUR_NORMS = _POST_NORMS | {
    "attn_norm": "input_layernorm.weight", "mlp_norm": "pre_feedforward_layernorm.weight",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A ``model_type`` of transformers."""

    title: str  # of its models, for users
    model_class: str
    layer_paths: dict[str, str]  # of a layer's weights, by the decoder's names
    differs: str = ""  # how it differs from Llama, for users
    speed: str = ONE_CALL  # or `RUNS` or `COMPOSED`, for users
    layer_config: Callable[[Any, Any], LayerConfig] = llama  # of a configuration and its rotary embedding's module
    final_norm: Callable[[Any], NormSpec] | None = None  # of a configuration
    rope_types: tuple[str, ...] = STATIC
    partial_rotary: bool = False  # whether a head may have values that are not rotated
    activations: tuple[str, ...] = ACTIVATIONS
    embedding_class: str = ""  # the model's own, if it is not torch's
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # supported values of the configuration's options


# To add a model family, add a row: its `model_type`, the class in transformers, and the paths of a layer's
# weights. If its layers are not Llama's, a function above returns their `LayerConfig`; a computation that
# `generic_layers.compute_layer` lacks goes there. tests/layerskip/models/test_model_families.py compares every row with
# transformers; add a tiny configuration to tests/layerskip/families_of.py.
ARCHITECTURES = {
    "llama": Architecture("Llama 2, 3, 3.x and SmolLM2", "LlamaForCausalLM", LAYER_PATHS),
    "mistral": Architecture("Mistral", "MistralForCausalLM", LAYER_PATHS, "a sliding window in some"),
    "qwen2": Architecture("Qwen2, Qwen2.5", "Qwen2ForCausalLM", LAYER_PATHS | QKV_BIAS, "biases of q, k and v"),
    "qwen3": Architecture("Qwen3", "Qwen3ForCausalLM", LAYER_PATHS | QK_NORM, "norms of q and k"),
    "phi3": Architecture(
        "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini", "Phi3ForCausalLM", _JOINED,
        "q, k, v are one matrix, gate and up another; longrope; partial rotation in Phi-4-mini",
        f"{ONE_CALL}; Phi-4-mini by {COMPOSED}", phi3, rope_types=(*STATIC, LONG), partial_rotary=True,
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
        "norms after attention and feed-forward; norms of q and k over all heads", COMPOSED, olmo2,
    ),
    "olmo3": Architecture(
        "OLMo 3", "Olmo3ForCausalLM", _ATTENTION | QK_NORM | _POST_NORMS | _MLP,
        "as OLMo 2; sliding windows; two rotary embeddings", COMPOSED, olmo3,
    ),
    "gemma3_text": Architecture(
        "Gemma 3 text", "Gemma3ForCausalLM", _ATTENTION | QK_NORM | _FOUR_NORMS | _MLP,
        "norms before and after; GELU; sliding windows; two rotary embeddings; a factor of the embedding",
        COMPOSED, gemma3, lambda config: NormSpec(1.0, 1.0), activations=("gelu_pytorch_tanh",),
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
        "experts; norms of q and k", COMPOSED, mixtral,
        only={"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
    ),
}  # fmt: skip


def norm_spec(config: Any) -> NormSpec | None:
    """How the final norm of a model is stored, if not as the ops take it."""
    final_norm = ARCHITECTURES[config.model_type].final_norm
    return None if final_norm is None else final_norm(config)


_MODEL_TYPES = ", ".join(ARCHITECTURES)


def supported_architectures() -> list[str]:
    """The supported values of ``model_type``, each with the models of that type."""
    return [f"{model_type} ({architecture.title})" for model_type, architecture in ARCHITECTURES.items()]


def layers_of(config: Any, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The parameters of each layer by the decoder's names."""
    paths = ARCHITECTURES[config.model_type].layer_paths
    return [
        {name: parameters[f"{LAYERS}.{number}.{path}"] for name, path in paths.items()}
        for number in range(config.num_hidden_layers)
    ]


def assemble(
    model: Any, parameters: Mapping[str, Tensor], frequency_factors: Tensor | None = None
) -> tuple[PartialDepthDecoder, EarlyExitHead]:
    """Make decoder and head of parameters, packed or plain, by the names that transformers gives them.

    ``model``, maybe on the meta device, provides the configuration and the rotary embedding; ``frequency_factors``
    [C/2] divide its frequencies.
    """
    config, layers = model.config, layers_of(model.config, parameters)
    made = ARCHITECTURES[config.model_type].layer_config(config, exact_module(model))
    if frequency_factors is not None:
        first, *others = made.rotaries
        bad = ~((frequency_factors > 0) & frequency_factors.isfinite())
        if frequency_factors.shape != first.inv_freq.shape or bool(bad.any()):
            raise ModelFileError(
                f"the divisors of the rotary frequencies have shape {list(frequency_factors.shape)}, "
                f"{int(bad.sum())} of them not above 0; expected {list(first.inv_freq.shape)}, all above 0"
            )
        made = replace(made, rotaries=(first._replace(inv_freq=first.inv_freq / frequency_factors), *others))
    decoder = PartialDepthDecoder.from_config(layers, config.num_key_value_heads, made)
    head = parameters[EMBEDDING if HEAD not in parameters else HEAD]
    return decoder, EarlyExitHead(parameters[NORM], head, made.eps, norm_spec=norm_spec(config))


def named_weights(model: LayerSkipModel) -> dict[str, Tensor]:
    """The weights of a model by transformers' names, packed or plain; a tied head has no entry."""
    named: dict[str, Tensor] = {EMBEDDING: model.embedding, NORM: model.head.kept_norm}
    if not model.config.tie_word_embeddings:
        named[HEAD] = model.head.head_weight
    paths = ARCHITECTURES[model.config.model_type].layer_paths
    for number in range(model.num_layers):
        layer = model.decoder.layer_parameters(number)
        named |= {f"{LAYERS}.{number}.{path}": layer[name] for name, path in paths.items()}
    return named


_KNOWN = ("torch.", "transformers.", "layerskip.", "compressed_tensors.", "liger_kernel.")


def architecture_of(model: Any) -> Architecture:
    """Return the architecture of a Hugging Face model, or raise UnsupportedModelError."""
    if isinstance(getattr(model, "decoder", None), PartialDepthDecoder):
        raise UnsupportedModelError(
            f"a LayerSkipModel (weights {model.weights}) was given where a model of transformers with plain weights is "
            "needed"
        )
    _check_adapters(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    ancestors = [ancestor.__name__ for ancestor in type(model).__mro__]
    architecture = ARCHITECTURES.get(str(model_type))
    if architecture is None or architecture.model_class not in ancestors:
        raise unsupported(
            f"model class {type(model).__name__} of model_type {model_type!r}",
            _MODEL_TYPES if architecture is None else architecture.model_class,
        )
    layers, said = len(model.model.layers), model.config.num_hidden_layers
    if layers < said:  # of more layers, only the first are used
        raise UnsupportedModelError(f"the model has {layers} layers, and config.num_hidden_layers is {said}")
    return architecture


def _check_adapters(model: nn.Module) -> None:
    """Refuse modules of PEFT but layers with LoRA."""
    for name, module in plain_modules(model) if isinstance(model, nn.Module) else ():
        if type(module).__module__.startswith("peft."):
            raise UnsupportedModelError(
                f"{name or 'the model'} is a {type(module).__name__} of PEFT: an adapter other than LoRA is not "
                "supported; use what merge_and_unload() of the PeftModel returns"
            )


def check_lora(model: nn.Module) -> None:
    """Refuse layers whose LoRA is active and not merged."""
    for name, module in model.named_modules():
        if has_lora(module) and lora_is_active(module):
            raise UnsupportedModelError(
                f"{name} has an active adapter of PEFT: merge it, by merge_adapter() or merge_and_unload() of the "
                "PeftModel, or decode within its disable_adapter()"
            )


def check_classes(model: nn.Module) -> None:
    """Refuse modules of other libraries' classes, whose forward would not be called."""
    for name, module in plain_modules(model):
        kind = class_of(module)
        if name and not kind.__module__.startswith(_KNOWN):
            raise unsupported(
                f"{name} of type {kind.__module__}.{kind.__name__}, whose forward would not be called",
                "modules of torch and transformers",
            )


def check_model_type(model_type: object) -> None:
    """Raise UnsupportedModelError for a ``model_type`` that is not in the table."""
    if model_type not in ARCHITECTURES:
        raise unsupported(f"model_type {model_type!r}", _MODEL_TYPES)


def check_config(config: Any) -> None:
    """Raise UnsupportedModelError for a configuration that the kernels do not compute."""
    check_model_type(config.model_type)
    architecture = ARCHITECTURES[config.model_type]
    method = method_of(config)
    if method is not None:
        raise unsupported(
            f"a transformers model quantised with {method}",
            "plain fp32, bf16 and fp16 weights here; decoding reads others",
        )
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        raise unsupported(f"layer type {min(others)!r}", "full_attention, sliding_attention")
    _check_rope(config, architecture)
    check_activation(config)
    for name, values in architecture.only.items():
        value = getattr(config, name, None)
        if value not in values:
            raise unsupported(f"{name} {value!r}", " or ".join(map(repr, values)))


def _check_rope(config: Any, architecture: Architecture) -> None:
    parameters = rope_parameters(config)
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in by_layer_type or [parameters]:
        if rope.get("rope_type") not in architecture.rope_types:
            raise unsupported(f"RoPE type {rope.get('rope_type')!r}", ", ".join(architecture.rope_types))
        for factor in (rope.get("partial_rotary_factor"), getattr(config, "partial_rotary_factor", None)):
            if factor not in (None, 1) and not architecture.partial_rotary:
                raise unsupported(
                    f"partial rotary embedding (partial_rotary_factor {factor})", "partial_rotary_factor 1"
                )


def check_activation(config: Any) -> None:
    """The check of `check_config` that also applies to `layerskip.accelerate`."""
    activations = ARCHITECTURES[config.model_type].activations
    name = "hidden_act" if hasattr(config, "hidden_act") else "hidden_activation"
    if getattr(config, name) not in activations:
        raise unsupported(f"{name} {getattr(config, name)!r}", ", ".join(activations))


def checked_parameters(hf_model: nn.Module, architecture: Architecture) -> dict[str, nn.Parameter]:
    """Return a model's parameters by name, tied ones under each name; UnsupportedModelError for unexpected ones."""
    parameters = {
        f"{name}.{own}": parameter
        for name, module in plain_modules(hf_model)
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    if getattr(hf_model.config, "quantization_config", None) is not None:
        parameters = without_leftovers(parameters)
    _check_modules(hf_model, architecture)
    check_parameter_names(parameters, architecture)
    _check_tensors(parameters)
    return parameters


def _check_modules(model: nn.Module, architecture: Architecture) -> None:
    """Refuse subclasses of Linear and Embedding, except those of `layerskip.accelerate`."""
    for name, module in plain_modules(model):
        for plain in (nn.Linear, nn.Embedding):
            own = f"{class_of(module).__module__}.{class_of(module).__name__}"
            if isinstance(module, plain) and class_of(module) is not plain and own != architecture.embedding_class:
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise unsupported(f"{name} of type {kind}", f"plain torch.nn.{plain.__name__}, neither quantised")


def check_parameter_names(parameters: dict[str, nn.Parameter], architecture: Architecture) -> None:
    """Raise UnsupportedModelError unless a model has exactly the parameters that are used."""
    numbers = {int(name.split(".")[2]) for name in parameters if name.startswith(f"{LAYERS}.")}
    paths, title = architecture.layer_paths.values(), architecture.model_class
    in_layers = (f"{LAYERS}.{number}.{path}" for number in range(len(numbers)) for path in paths)
    expected = dict.fromkeys((EMBEDDING, NORM, HEAD, *in_layers))  # a set in order
    for name in parameters:
        if name not in expected:
            raise unsupported(f"parameter {name}", f"in {title}: {', '.join(paths)}")
    for name in expected:
        if name not in parameters:
            raise UnsupportedModelError(f"{title} has no parameter {name}; quantised weights are unsupported")


def _check_tensors(parameters: dict[str, nn.Parameter]) -> None:
    first_name, first = next(iter(parameters.items()))
    check_one_device(parameters)
    for name, tensor in parameters.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
            raise unsupported(f"{name} of type {kind}", "plain tensors, neither quantised nor distributed")
        if tensor.dtype not in FLOATS:
            raise unsupported(f"{name} of dtype {tensor.dtype}", "fp32, bf16 and fp16")
        if tensor.dtype != first.dtype:
            raise unsupported(f"mixed dtypes ({first_name} {first.dtype}, {name} {tensor.dtype})", "one dtype")
        if not tensor.is_contiguous():
            raise unsupported(f"{name} with strides {tuple(tensor.stride())}", "contiguous weights")
