"""The names of the ways of decoding that a benchmark compares."""

AUTOREGRESSIVE = "autoregressive"
SELF_SPECULATIVE = "self-speculative"
TRANSFORMERS = "transformers"
EARLY_EXIT_ASSISTED = "transformers, early exit"
