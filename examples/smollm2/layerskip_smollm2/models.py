"""SmolLM2-135M-Instruct, stock or with one of the adapters of this package merged into its weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

import layerskip

from .weights import directory, gguf_file

STOCK, TRAINED = "smollm2", "smollm2-layerskip"
_FOLDER = Path(__file__).parent / "adapters"
ADAPTERS = {
    TRAINED: _FOLDER / "parsing",
    f"{TRAINED}-coding": _FOLDER / "coding",
    f"{TRAINED}-summarization": _FOLDER / "summarization",
}  # what is trained on the stock model, by the name of the result; a draft head lies beside each


def load(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """The model, merged with the adapter of that name if it is not the stock one, and its tokenizer.

    Parameters
    ----------
    name : str
        `STOCK`, or one of `ADAPTERS`.
    dtype : torch.dtype
        Of the result; a merge itself is in fp32, so that it rounds once.

    Raises
    ------
    FileNotFoundError
        Where the adapter is missing.
    ModuleNotFoundError
        Where peft, or the package that ships the weights, is absent.
    """
    if name == STOCK:
        return layerskip.load(directory(), dtype)
    adapter = ADAPTERS[name]
    if not (adapter / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"no adapter in {adapter}: adapter_model.safetensors is missing")
    from peft import PeftModel

    model, tokenizer = layerskip.load(directory(), torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's, of transformers
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged.to(dtype).eval(), tokenizer


def native(name: str) -> Path | None:
    """The file of quantized weights that the model comes in; what is merged with an adapter has none."""
    return gguf_file() if name == STOCK else None


def draft_head(name: str) -> Path | None:
    """The file of the model's draft head; the stock model has none."""
    return None if name == STOCK else ADAPTERS[name] / "draft_head.safetensors"


def exit(name: str) -> Path | None:
    """The file of the exit that drafts for the stock model; the others draft without one."""
    return Path(__file__).parent / "exits" / "smollm2.safetensors" if name == STOCK else None
