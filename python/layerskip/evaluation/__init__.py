"""What a model's answers are worth at full depth, at an early exit, and with self-speculation, which changes none.

``layerskip eval`` runs it; `harness` has the model class of the package lm_eval.
"""
