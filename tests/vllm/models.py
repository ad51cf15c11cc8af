"""Small random models, and a tokenizer, as directories that vLLM serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from layerskip import Exit
from layerskip.models import adapt, load

VOCABULARY = 300  # no multiple of 64, to which vLLM pads
LAYERS = 4
END = VOCABULARY - 1
_CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's attention on CPUs has no smaller one
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
}


def write_model(directory: Path, architecture: str = "Llama", upper: float = 0.15, **changes: Any) -> Path:
    """A model in fp32 whose layers after the first add ``upper`` of what they would, so that some drafts are accepted.

    Its tokens vary.
    """
    config = getattr(transformers, f"{architecture}Config")(
        **{**_SIZES, **ARCHITECTURES.get(architecture, {}), **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            values = values * 0.1
        parameter.data = values * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 1 + 0.3 * values
    for layer in model.model.layers[1:]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= upper
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def copied(
    directory: Path, exit_layer: int = 2, token_ids: torch.Tensor | None = None, norm: float = 1.0, **settings: Any
) -> dict[str, Any]:
    """The options of an engine whose exit copies the layers that follow it, and has ``norm`` times the norm."""
    model = adapt(load(directory, torch.float32)[0])
    rest = [model.decoder.layer(number) for number in range(exit_layer, LAYERS)]
    exit = Exit(exit_layer, norm * model.head.norm_weight, LAYERS, VOCABULARY, rest, token_ids)
    extra = {"exit": str(exit.save(directory / "exit")), **settings}
    return {"load_format": "layerskip", "model_loader_extra_config": extra}


def tokenizer() -> Any:
    """A token a byte, then fillers, then the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<{number}>" for number in range(len(alphabet), END)]
    table = {token: index for index, token in enumerate([*alphabet, *fillers, "<end>"])}
    made = Tokenizer(models.BPE(table, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    wrapped.chat_template = _CHAT
    return wrapped


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, one prompt a length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(END, (length,), generator=generator).tolist() for length in lengths]
