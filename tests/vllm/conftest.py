"""vLLM in one process and on one thread, and the models that it serves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# A model this small gains nothing from a second thread; and once an engine was made, vLLM refuses to set their number.
torch.set_num_threads(1)

# Read when vLLM is first imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, which says nothing of its exit."""
    from .models import write_model

    return write_model(tmp_path_factory.mktemp("llama"))
