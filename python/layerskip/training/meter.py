"""Running means of what the exits do between two lines of the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_COLUMNS = ("loss", "labels", "agreed", "right", "reported")


class ExitMeter:
    """Sums per exit, kept on the device until a line of the log is due."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, exits: Sequence[int], out: dict[str, Any]) -> None:
        """Take in what a converted model returned for ``exits``; with ``tokens``, the last is the full depth."""
        losses, count = out["exit_losses"].detach().double(), float(out["num_labels"])
        rows = torch.zeros(len(exits), len(_COLUMNS), dtype=torch.float64, device=losses.device)
        rows[:, 0], rows[:, 1] = losses * count, count
        if "tokens" in out:
            rows[:, 2] = (out["tokens"] == out["tokens"][-1]).sum(1)
            rows[:, 3] = (out["tokens"] == out["targets"]).sum(1)
            rows[:, 4] = out["targets"].shape[0]
        for exit_layer, row in zip(exits, rows, strict=True):
            self._sums[exit_layer] = self._sums.get(exit_layer, 0) + row

    def drain(self, exits: Sequence[int], accelerator: Any) -> dict[str, float]:
        """Means over all ranks since the last call; ``exits`` are all that any rank may have seen."""
        zeros = torch.zeros(len(_COLUMNS), dtype=torch.float64, device=accelerator.device)
        table = torch.stack([self._sums.get(exit_layer, zeros) for exit_layer in exits])
        self._sums = {}
        metrics: dict[str, float] = {}
        summed = accelerator.reduce(table, reduction="sum").tolist()
        for exit_layer, (loss, labels, agreed, right, reported) in zip(exits, summed, strict=True):
            if labels:
                metrics[f"exit_loss/{exit_layer}"] = loss / labels
            if reported:
                metrics[f"exit_agreement/{exit_layer}"] = agreed / reported
                metrics[f"exit_accuracy/{exit_layer}"] = right / reported
        return metrics
