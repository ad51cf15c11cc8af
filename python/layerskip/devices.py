"""Where to compute, by name."""

from __future__ import annotations

import torch


def find(name: str) -> torch.device:
    """What ``cpu``, ``cuda``, ``cuda:N`` or ``auto`` stands for: "auto" is the first card, or the CPU without one.

    Raises
    ------
    ValueError
        For a card that is not there, with those that are.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and cards == 0):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index < cards:
        return torch.device("cuda", index)
    built = "" if torch.version.cuda else ", which was built without CUDA,"
    seen = ", ".join(described(torch.device("cuda", other)) for other in range(cards)) or "no card"
    raise ValueError(f"the device {name} is not there: torch {torch.__version__}{built} sees {seen}")


def described(device: torch.device) -> str:
    """A device, with the name of the card that it is."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
