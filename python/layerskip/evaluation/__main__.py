"""``python -m layerskip.evaluation`` runs the command ``lm_eval`` with the model ``layerskip`` registered."""

from __future__ import annotations

from .._imports import need

need("lm_eval.__main__", "evaluating").cli_evaluate()
