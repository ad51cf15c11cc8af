"""AWQ in the layout of its matrix product, "gemm": words along the outputs, eight each, the even before the odd.

``qweight`` [D, N / 8], ``qzeros`` [G, N / 8], ``scales`` [G, N].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..unsupported import unsupported
from .checkpoint import SafetensorsCheckpoint
from .integers import check_group_size, packed_integers, unpacked

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs 0 … 7 in a word


class AwqCheckpoint(SafetensorsCheckpoint):
    """Weights of 4 bits in groups with zero points."""

    stem = ".qweight"
    modules = (
        "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear",
        "gptqmodel.nn_modules.qlinear.gemm_awq.AwqGEMMLinear",
        "gptqmodel.nn_modules.qlinear.gemm_awq_triton.AwqGEMMTritonLinear",
        "awq.modules.linear.gemm.WQLinear_GEMM",
    )

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        bits = settings.get("bits", settings.get("w_bit", 4))
        if bits != 4:
            raise unsupported(f"AWQ with bits {bits!r}", "bits 4")
        self._group_size = settings.get("group_size", settings.get("q_group_size"))
        check_group_size("AWQ", self._group_size)
        version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if version != "gemm" or settings.get("backend") == "llm-awq":
            raise unsupported(f"AWQ with version {version!r}", "gemm")

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        """See `SafetensorsCheckpoint`."""
        rows, width = shape
        scale = self.files.read(f"{module}.scales", [None, rows])
        words = self.files.read(f"{module}.qweight", [width, rows // 8], torch.int32)
        zeros = self.files.read(f"{module}.qzeros", [scale.shape[0], rows // 8], torch.int32)
        name, group = f"{module}.qweight", self._group_size
        return packed_integers(name, 4, _in_order(words), scale.t(), _in_order(zeros), group)


def _in_order(words: Tensor) -> Tensor:
    """The integers [N, A] of words [A, N / 8]."""
    return unpacked(words, 4).unflatten(1, (-1, 8))[:, :, list(_PLACES)].flatten(1).t().contiguous()
