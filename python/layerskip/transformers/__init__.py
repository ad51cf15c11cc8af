"""Integration in Hugging Face transformers: fused modules, a custom ``generate``, and a quantizer."""
