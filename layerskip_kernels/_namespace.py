"""The two namespaces of the ops: of what users call, and of what compiled libraries implement (common/library.cpp)."""

from typing import Any

import torch

from ._ops import add_op_namespace_prefix

PUBLIC = add_op_namespace_prefix("").removesuffix("::")
NATIVE = f"{PUBLIC}_native"
native_ops: Any = getattr(torch.ops, NATIVE)


def has_native(op: str, device: str) -> bool:
    """Whether a compiled library implements an op on a device."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NATIVE}::{op}", device.upper()))
