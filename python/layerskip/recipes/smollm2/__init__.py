"""SmolLM2-135M-Instruct as a LayerSkip model, by task: the recipes here train the adapters beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from ...models import load as load_model
from ...models.smollm2 import smollm2_directory

ADAPTER = Path(__file__).parent / "adapter"


def load(dtype: torch.dtype = torch.bfloat16, adapter: Path = ADAPTER) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with the adapter merged into its weights, and its tokenizer.

    Parameters
    ----------
    dtype : torch.dtype
        Of the result; the merge itself is in fp32, so that it rounds once.
    adapter : Path
        A directory with ``adapter_config.json`` and ``adapter_model.safetensors``, as peft writes them.

    Raises
    ------
    FileNotFoundError
        Where there is no adapter.
    ModuleNotFoundError
        Where peft, or the package that ships the model, is absent.
    """
    if not (adapter / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"no adapter in {adapter}: adapter_model.safetensors is missing")
    from peft import PeftModel

    model, tokenizer = load_model(smollm2_directory(), torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's, of transformers
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged.to(dtype).eval(), tokenizer
