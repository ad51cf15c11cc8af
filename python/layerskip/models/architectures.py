"""Supported architectures: the table, the checks, and the parts built of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .generic_layers import (
    ComposedDecoder,
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
from .head import EarlyExitHead, NormForm
from .hf_checks import UnsupportedModelError, class_of, unsupported
from .layers import PartialDepthDecoder
from .model import LayerSkipModel
from .rotary import LONG, STATIC, check_layer_types, check_rope, exact_module

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


LAYERS = "model.layers"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def layers_of(config: Any, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The parameters of each layer, by the names that a decoder holds them by."""
    paths = ARCHITECTURES[config.model_type].layer_paths
    return [
        {name: parameters[f"{LAYERS}.{number}.{path}"] for name, path in paths.items()}
        for number in range(config.num_hidden_layers)
    ]


def assemble(
    model: Any, parameters: Mapping[str, Tensor], frequency_factors: Tensor | None = None
) -> tuple[PartialDepthDecoder, EarlyExitHead]:
    """The decoder and the head of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of a supported architecture, maybe on the meta device; for its configuration and its rotary embedding.
    parameters : mapping
        By the names that transformers gives them; packed or plain.
    frequency_factors : Tensor [C/2], optional
        What divides the frequencies of the rotary embedding.
    """
    config, layers = model.config, layers_of(model.config, parameters)
    form = ARCHITECTURES[config.model_type].form(config, exact_module(model))
    if frequency_factors is not None:
        first, *others = form.rotaries
        form = replace(form, rotaries=(first._replace(inv_freq=first.inv_freq / frequency_factors), *others))
    decoder = _decoder(layers, config.num_key_value_heads, form)
    head = parameters[EMBEDDING if HEAD not in parameters else HEAD]
    return decoder, EarlyExitHead(parameters[NORM], head, form.eps, norm_form=norm_form_of(config))


def _decoder(layers: list[dict[str, Tensor]], num_kv_heads: int, form: Form) -> PartialDepthDecoder:
    if not form.one_call:
        return ComposedDecoder(layers, num_kv_heads, form)
    inv_freq, scaling, _ = form.rotaries[0]
    return PartialDepthDecoder(layers, num_kv_heads, form.eps, inv_freq, scaling, max_positions=form.max_positions)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KNOWN = ("torch.", "transformers.", "layerskip.", "compressed_tensors.", "liger_kernel.")
_LEFT = ("weight_", "input_", "output_")  # begin the names of scales and zero points beside a weight

Held = TypeVar("Held", bound=Tensor)


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a Hugging Face model, or UnsupportedModelError."""
    if isinstance(model, LayerSkipModel):
        raise UnsupportedModelError(
            f"a LayerSkipModel (weights {model.weights}) was given where a model of transformers with plain weights is "
            "needed"
        )
    _check_adapters(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    ancestors = [ancestor.__name__ for ancestor in type(model).__mro__]
    architecture = ARCHITECTURES.get(str(model_type))
    if architecture is None or architecture.model_class not in ancestors:
        classes = ", ".join(one.model_class for one in ARCHITECTURES.values())
        raise unsupported(
            f"model class {type(model).__name__} of model_type {model_type!r}",
            f"{', '.join(supported_architectures())}, as {classes}",
        )
    _check_depth(model)
    return architecture


def _check_depth(model: Any) -> None:
    """Refuse fewer layers than the configuration says; of more, only the first are used."""
    layers, said = len(model.model.layers), model.config.num_hidden_layers
    if layers < said:
        raise UnsupportedModelError(f"the model has {layers} layers, and config.num_hidden_layers is {said}")


def _check_adapters(model: nn.Module) -> None:
    """Refuse what PEFT has put into a model, or around it."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module).__module__.startswith("peft."):
            raise UnsupportedModelError(
                f"{name or 'the model'} is a {type(module).__name__} of PEFT: an adapter that is not merged is not "
                "supported; use what merge_and_unload() of the PeftModel returns"
            )


def check_classes(model: nn.Module) -> None:
    """Refuse modules of classes that are somebody's own, maybe with the right parameters, for nobody calls them."""
    for name, module in model.named_modules():
        kind = class_of(module)
        if name and not kind.__module__.startswith(_KNOWN):
            raise unsupported(
                f"{name} of type {kind.__module__}.{kind.__name__}, whose forward would not be called",
                "modules of torch and transformers",
            )


def check_model_type(model_type: object) -> None:
    """Raise UnsupportedModelError for a ``model_type`` that is not in the table."""
    if model_type not in ARCHITECTURES:
        raise unsupported(f"model_type {model_type!r}", ", ".join(supported_architectures()))


def check_config(config: Any) -> None:
    """Refuse by name what the kernels do not compute, as far as the configuration says it.

    Parameters
    ----------
    config : transformers.PreTrainedConfig

    Raises
    ------
    UnsupportedModelError
    """
    check_model_type(config.model_type)
    _check_quantisation(config)
    check_layer_types(config)
    architecture = ARCHITECTURES[config.model_type]
    check_rope(config, architecture.rope_types, architecture.partial_rotary)
    check_activation(config)
    for name, values in architecture.only.items():
        value = getattr(config, name, None)
        if value not in values:
            raise unsupported(f"{name} {value!r}", " or ".join(map(repr, values)))


def check_activation(config: Any) -> None:
    """The check of `check_config` that also applies to a model that keeps its own attention."""
    activations = ARCHITECTURES[config.model_type].activations
    name = "hidden_act" if hasattr(config, "hidden_act") else "hidden_activation"
    if getattr(config, name) not in activations:
        raise unsupported(f"{name} {getattr(config, name)!r}", ", ".join(activations))


def checked_parameters(hf_model: nn.Module, architecture: Architecture) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, tied ones under each of their names; UnsupportedModelError for others."""
    parameters = dict(hf_model.named_parameters(remove_duplicate=False))
    if getattr(hf_model.config, "quantization_config", None) is not None:
        parameters = without_leftovers(parameters)
    _check_modules(hf_model, architecture)
    check_names(parameters, architecture)
    _check_tensors(parameters)
    return parameters


def without_leftovers(tensors: Mapping[str, Held]) -> dict[str, Held]:
    """The tensors of a model less what decompressing has left: scales and zero points of weights that are plain now."""
    plain = {name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dtype in FLOATS}

    def is_left(name: str) -> bool:
        module, _, own = name.rpartition(".")
        return own.startswith(_LEFT) and f"{module}.weight" in plain

    return {name: tensor for name, tensor in tensors.items() if not is_left(name)}


def _check_quantisation(config: Any) -> None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    method = getattr(method, "value", method)
    if method != "gguf":  # whose weights may have been made plain while they were read; they are checked
        raise unsupported(
            f"a transformers model quantised with {method}",
            "plain fp32, bf16 and fp16 weights here; decoding reads others",
        )


def _check_modules(model: nn.Module, architecture: Architecture) -> None:
    """Refuse subclasses of Linear and Embedding, which may compute something else; `layerskip.accelerate`'s do not."""
    for name, module in model.named_modules():
        for plain in (nn.Linear, nn.Embedding):
            own = f"{class_of(module).__module__}.{class_of(module).__name__}"
            if isinstance(module, plain) and class_of(module) is not plain and own != architecture.embedding_class:
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise unsupported(f"{name} of type {kind}", f"plain torch.nn.{plain.__name__}, neither quantised")


def _expected_names(architecture: Architecture, num_layers: int) -> Iterator[str]:
    yield from (EMBEDDING, NORM, HEAD)
    for number in range(num_layers):
        yield from (f"{LAYERS}.{number}.{path}" for path in architecture.layer_paths.values())


def check_names(parameters: dict[str, nn.Parameter], architecture: Architecture) -> None:
    """Raise UnsupportedModelError for a model that has not exactly the parameters that are used."""
    numbers = {int(name.split(".")[2]) for name in parameters if name.startswith(f"{LAYERS}.")}
    expected = dict.fromkeys(_expected_names(architecture, len(numbers)))  # a set in order
    title = architecture.model_class
    for name in parameters:
        if name not in expected:
            raise unsupported(f"parameter {name}", f"in {title}: {', '.join(architecture.layer_paths.values())}")
    for name in expected:
        if name not in parameters:
            raise UnsupportedModelError(f"{title} has no parameter {name}; quantised weights are unsupported")


def _check_tensors(parameters: dict[str, nn.Parameter]) -> None:
    first_name, first = next(iter(parameters.items()))
    for name, tensor in parameters.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
            raise unsupported(f"{name} of type {kind}", "plain tensors, neither quantised nor distributed")
        if tensor.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device: the model's weights are not loaded")
        if tensor.dtype not in FLOATS:
            raise unsupported(f"{name} of dtype {tensor.dtype}", "fp32, bf16 and fp16")
        if tensor.dtype != first.dtype:
            raise unsupported(f"mixed dtypes ({first_name} {first.dtype}, {name} {tensor.dtype})", "one dtype")
        if tensor.device != first.device:
            raise unsupported(f"several devices ({first_name} on {first.device}, {name} on {tensor.device})", "one")
        if not tensor.is_contiguous():
            raise unsupported(f"{name} with strides {tuple(tensor.stride())}", "contiguous weights")


def named_weights(model: LayerSkipModel) -> dict[str, Tensor]:
    """Of a model's embedding, layers and head, packed or plain; a tied head is the embedding, and has no entry."""
    named: dict[str, Tensor] = {EMBEDDING: model.embedding, NORM: model.head.kept_norm}
    if not model.config.tie_word_embeddings:
        named[HEAD] = model.head.head_weight
    paths = ARCHITECTURES[model.config.model_type].layer_paths
    for number in range(model.num_layers):
        layer = model.decoder.held(number)
        named |= {f"{LAYERS}.{number}.{path}": layer[name] for name, path in paths.items()}
    return named
