"""What ``model.generate(custom_generate=<this folder or its copy on the hub>, trust_remote_code=True)`` calls."""

from layerskip import generate

__all__ = ["generate"]
