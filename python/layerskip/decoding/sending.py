"""How what the host knows goes to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. The host does not wait for the copy, which a round has no time for.

    A card copies only from pinned memory while the host goes on; torch does not reuse that before the copy is done.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
