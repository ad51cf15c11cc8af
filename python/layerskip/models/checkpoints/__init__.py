"""Readers of checkpoints with quantized weights, by layout."""
