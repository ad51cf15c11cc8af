"""GPTQ: words along the inputs, a zero point and a scale for each group and output.

``qweight`` [D · bits / 32, N], ``qzeros`` [G, N · bits / 32], ``scales`` [G, N]. The first convention keeps zero points
less one, the second ("gptq_v2") as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..files import ModelFileError
from ..unsupported import unsupported
from .checkpoint import SafetensorsCheckpoint
from .integers import check_group_size, packed_integers, unpacked

BITS = (4, 8)
_CONVENTIONS = {"gptq": 1, "gptq_v2": 0}  # to what is added to a stored zero point


class GptqCheckpoint(SafetensorsCheckpoint):
    """Weights of 4 bits, or of 8 without zero points, in groups or per output, in the order of the inputs."""

    stem = ".qweight"
    modules = (
        "gptqmodel.nn_modules.qlinear.torch.TorchLinear",
        "gptqmodel.nn_modules.qlinear.tritonv2.TritonV2Linear",
    )

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._bits: int = settings.get("bits", 0)
        if self._bits not in BITS:
            raise unsupported(f"GPTQ with bits {self._bits!r}", "bits 4 and 8")
        if self._bits == 8 and settings.get("sym") is False:
            raise unsupported("GPTQ with bits 8 and sym false", "sym true")
        check_group_size("GPTQ", settings.get("group_size"))
        if settings.get("desc_act"):
            raise unsupported("GPTQ with desc_act true (act-order)", "desc_act false")
        if any(not str(module).startswith("-:") for module in settings.get("dynamic") or {}):
            raise unsupported(
                "GPTQ with settings of single modules (dynamic)", "one setting for all, and left out ones"
            )
        convention = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
        if convention not in _CONVENTIONS:
            raise unsupported(f"GPTQ with checkpoint_format {convention!r}", ", ".join(_CONVENTIONS))
        self._less = _CONVENTIONS[convention]

    def take_over(self, model: nn.Module) -> None:
        """Some kernels take the second convention, into which gptqmodel then turns the zero points; it notes that."""
        kernels: Iterable[Any] = (module for module in model.modules() if hasattr(module, "qzero_format"))
        if any(kernel.qzero_format() == 2 for kernel in kernels):
            self._less = _CONVENTIONS["gptq_v2"]

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        """See `SafetensorsCheckpoint`."""
        (rows, width), bits = shape, self._bits
        scale = self.files.read(f"{module}.scales", [None, rows])
        groups, group = scale.shape[0], self.settings.get("group_size")
        self._check_order(module, width, groups)
        words = self.files.read(f"{module}.qweight", [width * bits // 32, rows], torch.int32)
        stored = self.files.read(f"{module}.qzeros", [groups, rows * bits // 32], torch.int32)
        zero = self._zero(f"{module}.qzeros", unpacked(stored, bits))
        return packed_integers(f"{module}.qweight", bits, unpacked(words.t(), bits), scale.t(), zero.t(), group)

    def _zero(self, name: str, stored: Tensor) -> Tensor:
        """Zero points. Of symmetric weights they are the middle, which some writers of the first convention keep."""
        largest = (1 << self._bits) - 1
        if not self.settings.get("sym"):
            return (stored + self._less) & largest
        middle = (largest + 1) // 2
        for value in (middle - self._less, middle):
            if bool((stored == value).all()):
                return torch.full_like(stored, middle)
        raise ModelFileError(f"{name} is not the middle of the range, though quantization_config says sym")

    def _check_order(self, module: str, width: int, groups: int) -> None:
        """Refuse an order of the inputs other than theirs, which only desc_act should give."""
        name = f"{module}.g_idx"
        if name not in self.files or width % groups:
            return
        found = self.files.read(name, [width])
        if not torch.equal(found.long(), torch.arange(width) // (width // groups)):
            raise unsupported(f"{name} in another order than the inputs' (act-order)", "desc_act false")
