"""Set-up of every test: Triton's interpreter where there is no card, one thread a worker under xdist."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Read by triton when it is first imported, so it must be set before any test module is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers already share the cores; a second thread each would spin at barriers for a core it does not have.
    torch.set_num_threads(1)
