"""This library inside Hugging Face's transformers: fused modules in its models, and its own ``generate``."""
