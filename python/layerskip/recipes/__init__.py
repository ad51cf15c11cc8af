"""Recipes that turn existing models into LayerSkip models, and what came out of them."""

from __future__ import annotations

import os
from typing import Any

import torch

from .. import models
from ..models.smollm2 import smollm2_directory
from . import smollm2

STOCK, ADAPTED = "smollm2", "smollm2-layerskip"
ADAPTERS = {
    ADAPTED: smollm2.ADAPTER,
    f"{ADAPTED}-coding": smollm2.ADAPTER.with_name("coding"),
    f"{ADAPTED}-summarization": smollm2.ADAPTER.with_name("summarization"),
}  # what is trained on the stock model, by the name of the result; a draft head lies beside each


def load(name: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """`layerskip.models.load`, which also knows ``smollm2`` and, with an adapter merged, the names in `ADAPTERS`."""
    if name in ADAPTERS:
        return smollm2.load(dtype, ADAPTERS[os.fspath(name)])
    return models.load(smollm2_directory() if name == STOCK else name, dtype)
