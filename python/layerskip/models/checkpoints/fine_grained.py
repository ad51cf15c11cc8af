"""The fp8 of transformers ("fine-grained"), as Qwen3 and DeepSeek come in it: float8 with a scale for each block.

``weight`` [N, D] in float8_e4m3fn, ``weight_scale_inv`` [ceil(N / rows), D / columns], which multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..unsupported import unsupported
from .checkpoint import SafetensorsCheckpoint
from .integers import packed_floats


class FineGrainedCheckpoint(SafetensorsCheckpoint):
    """Activations stay as they are."""

    stem = ".weight_scale_inv"
    modules = ("transformers.integrations.finegrained_fp8.FP8Linear",)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        block = settings.get("weight_block_size")
        if not (isinstance(block, Sequence) and len(block) == 2 and block[1] % 32 == 0):
            raise unsupported(f"fp8 with weight_block_size {block!r}", "[rows, columns], the columns a multiple of 32")
        kind = settings.get("fmt", "e4m3")
        if kind != "e4m3":
            raise unsupported(f"fp8 with fmt {kind!r}", "e4m3")
        self._block = block

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        """See `SafetensorsCheckpoint`."""
        rows, columns = self._block
        places = [-(-shape[0] // rows), -(-shape[1] // columns)]
        scale = self.files.read(f"{module}.weight_scale_inv", places)
        values = self.files.read(f"{module}.weight", shape, torch.float8_e4m3fn)
        return packed_floats(f"{module}.weight", values, scale.repeat_interleave(rows, dim=0)[: shape[0]], columns)
