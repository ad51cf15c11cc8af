"""``python -m layerskip.evaluation`` is the command ``lm_eval``, with the model ``layerskip`` known to it."""

from __future__ import annotations

from .._imports import need
from . import harness  # noqa: F401 - registers the model

need("lm_eval.__main__", "evaluating with lm_eval").cli_evaluate()
