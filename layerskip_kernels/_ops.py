"""The namespace of the public ops. The build of a Hugging Face hub package replaces this file."""

import torch

ops = torch.ops.layerskip


def add_op_namespace_prefix(op: str) -> str:
    """Name an op with its namespace, as torch's registry does."""
    return f"layerskip::{op}"
