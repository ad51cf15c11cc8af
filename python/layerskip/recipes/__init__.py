"""Recipes that turn existing models into LayerSkip models, and what came out of them."""

from __future__ import annotations

import os
from typing import Any

import torch

from .. import models
from ..models.smollm2 import smollm2_directory
from . import smollm2

STOCK, ADAPTED = "smollm2", "smollm2-layerskip"


def load(name: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """`layerskip.models.load`, which also knows ``smollm2`` and, with the adapter merged, ``smollm2-layerskip``."""
    if name == ADAPTED:
        return smollm2.load(dtype)
    return models.load(smollm2_directory() if name == STOCK else name, dtype)
