"""The namespace of the public ops. A package for the Hugging Face hub has another file here, with a name of its own."""

import torch

ops = torch.ops.layerskip


def add_op_namespace_prefix(op: str) -> str:
    """Name an op with its namespace, as torch's registry does."""
    return f"layerskip::{op}"
