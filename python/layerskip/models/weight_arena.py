"""Memory of a model's weights: one mapping, in the order in which decoding reads them, in huge pages.

Decoding one token reads every weight once. Weights in scattered pages of 4 KiB cost a page table lookup every few
thousand cycles, and the processor's prefetching stops at the end of each page and tensor. Packed weights may be
interleaved, in the order in which the processor multiplies them.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels import LayerWeights, multiplies_panels
from layerskip_kernels.formats import PANEL_ROWS, can_interleave, interleave, is_interleaved, rows_of

from .adaptation import adapt
from .checkpoints.base import KEEPS_ROWS
from .head import ExitWeights
from .hf_checks import unsupported
from .model import LayerSkipModel
from .quantize import MATRICES

HUGE = 2 << 20  # bytes of a huge page, and of the alignment that it needs
TRIM = 32 << 20  # bytes that are moved before the freed memory is returned to the system
LINE = 64  # bytes; each weight begins at a line of the cache
_SMAPS = Path("/proc/self/smaps")


class WeightArena:
    """One memory mapping of ``size`` bytes for the weights of a model, in huge pages if possible."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Private: shared memory, the default, has a rule of its own for huge pages.
        self._memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()
        self._next = -start % HUGE
        self.address = start + self._next
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # of a kernel that was built without them; small pages serve
                self._memory.madvise(mmap.MADV_HUGEPAGE)

    def take(self, tensor: Tensor) -> Tensor:
        """Copy a tensor behind those before; the copy keeps the memory alive.

        It is its own storage: saving a model takes tensors of one storage for one weight under several names.
        """
        return self._room(tensor, tensor.dtype).copy_(tensor.detach())

    def take_interleaved(self, tensor: Tensor, width: int) -> Tensor:
        """Copy a packed weight for inputs of ``width``, with its rows interleaved."""
        return interleave(tensor.detach(), width, self._room(tensor, torch.int16))

    def _room(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        room = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=self._next)
        self._next += _lines(tensor)
        return room.view(tensor.shape).view(dtype)

    def huge_bytes(self) -> int:
        """The number of bytes in huge pages, as the kernel reports; 0 if it does not."""
        inside = 0
        for line in _SMAPS.read_text().splitlines() if _SMAPS.is_file() else ():
            field = line.split()
            if "-" in field[0] and not field[0].endswith(":"):
                begin, end = (int(part, 16) for part in field[0].split("-"))
                inside = max(0, min(end, self.address + self.size) - max(begin, self.address))
            elif field[0] == "AnonHugePages:" and inside:
                return min(1024 * int(field[1]), inside)
        return 0


def gather_weights(model: Any) -> WeightArena | None:
    """Move a model's weights into one arena, in place, in the order in which decoding reads them.

    Every holder of a parameter sees it in its new place, with the same values; a view of a weight keeps the old memory.
    Not for a model that decodes at the same time in another thread.

    Packed integers are interleaved if the processor multiplies them so (`layerskip_kernels.formats.interleave`), except
    those that a transformers model holds, too. Before such a model is moved to another device, call `scatter_weights`.

    Parameters
    ----------
    model : LayerSkipModel or transformers.PreTrainedModel
        UnsupportedModelError as `layerskip.adapt`, and if another library holds the weights quantized.

    Returns
    -------
    WeightArena or None
        None if the weights are not in plain memory of this process: on a GPU, or made in inference mode.
    """
    tensors = _weights(model)
    if any(not tensor.is_cpu or tensor.is_inference() for tensor in tensors):
        return None
    panels = _panels(model)
    places = {(tensor.data_ptr(), tensor.shape): _lines(tensor) for tensor in tensors}  # tied ones have one place
    arena, moved = WeightArena(sum(places.values())), dict[tuple[int, torch.Size], Tensor]()
    since_trim = 0
    for tensor in tensors:
        place = (tensor.data_ptr(), tensor.shape)
        if place not in moved:
            width = panels.get(id(tensor))
            moved[place] = arena.take(tensor) if width is None else arena.take_interleaved(tensor, width)
        tensor.data = moved[place]  # which frees the old memory, so that both copies never exist at once
        since_trim += tensor.nbytes
        if since_trim > TRIM:
            _trim()
            since_trim = 0
    _trim()
    if isinstance(model, LayerSkipModel):
        model.refresh()
    return arena


def scatter_weights(model: Any) -> None:
    """Undo `gather_weights`: give each weight memory of its own, which frees the arena.

    Not while the model decodes in another thread.
    """
    moved: dict[int, Tensor] = {}
    matrices = model.matrices() if isinstance(model, LayerSkipModel) else []  # those of other models are plain
    widths = {id(weight): width for weight, width in matrices if is_interleaved(weight)}
    for tensor in _weights(model):
        if tensor.data_ptr() not in moved:
            own = tensor.detach()
            moved[tensor.data_ptr()] = rows_of(own, widths[id(tensor)]) if id(tensor) in widths else own.clone()
        tensor.data = moved[tensor.data_ptr()]
    if isinstance(model, LayerSkipModel):
        model.refresh()


def gather_exit(exit: ExitWeights) -> ExitWeights:
    """Move an exit's int8 draft layers and head into an arena of its own.

    An exit in the model's dtype stays as it is, since it shares tensors with `Exit` or the model, and so does one on a
    GPU. Packed draft layers are interleaved as in `gather_weights`; a model with them cannot be moved to another
    device.
    """
    head, rows = exit.head, exit.head.head_weight
    tensors = [*(weight for layer in exit.draft_layers for weight in layer if weight is not None), rows]
    if head.scale is None or any(not tensor.is_cpu or tensor.is_inference() for tensor in tensors):
        return exit
    arena = WeightArena(sum(map(_lines, tensors)))
    draft_layers = tuple(_gathered(layer, arena, head.norm_weight) for layer in exit.draft_layers)
    rows.data = arena.take(rows)
    return exit._replace(draft_layers=draft_layers)


def _gathered(layer: LayerWeights, arena: WeightArena, norm: Tensor) -> LayerWeights:
    """Copy a draft layer into an arena, in the order of reading; ``norm`` [D] has the dtype of its states."""
    weights = {name: weight for name, weight in layer._asdict().items() if weight is not None}
    widths = dict.fromkeys(MATRICES, norm.shape[0]) | {"o": layer.q.shape[0], "down": layer.gate.shape[0]}
    matrices = {name: width for name, width in widths.items() if name in weights}
    panels = norm.dtype == torch.bfloat16 and multiplies_panels()
    panels = panels and all(can_interleave(weights[name], width) for name, width in matrices.items())
    taken = {
        name: arena.take_interleaved(weights[name], width) if panels else arena.take(weights[name])
        for name, width in matrices.items()
    }
    return LayerWeights(**{name: taken[name] if name in taken else arena.take(weights[name]) for name in weights})


def _panels(model: Any) -> dict[int, int]:
    """The weights to interleave, by id, with their widths: all of a model's layers, or none."""
    if not isinstance(model, LayerSkipModel) or model.dtype != torch.bfloat16 or not multiplies_panels():
        return {}
    *layers, head, embedding = model.matrices()
    layers = [one for one in layers if one[0].dim() == 2]  # experts stay rows
    if any(hasattr(weight, KEEPS_ROWS) for weight, _ in (*layers, head, embedding)):
        return {}
    keys = model.decoder.num_kv_heads * model.decoder.head_dim  # rows of k and v, which may be parts of a larger matrix
    even = keys % PANEL_ROWS == 0 and all(can_interleave(*one) for one in layers)
    outer = [one for one in (head, embedding) if can_interleave(*one)]
    return {id(weight): width for weight, width in (*(layers if even else ()), *outer)}


def _trim() -> None:
    """Return freed memory to the system, which glibc keeps otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _weights(model: Any) -> list[Tensor]:
    """Each weight of `_in_order` once; of tied ones that are two parameters both."""
    adapted = model if isinstance(model, LayerSkipModel) else adapt(model)
    tensors = {id(tensor): tensor for tensor in _in_order(adapted)}
    if not tensors.keys() <= {id(tensor) for tensor in model.parameters()}:  # adapting made some
        raise unsupported(
            "moving what another library holds quantized", "layerskip.adapt(model), whose weights are own"
        )
    return list(tensors.values())


def _in_order(model: LayerSkipModel) -> Iterator[Tensor]:
    """The weights of matmuls in the order of reading, then small ones.

    Small ones come along because they would keep the old memory if all of it is one mapped file.
    """
    layers = [model.decoder.layer_parameters(number) for number in range(model.num_layers)]
    for layer in layers:
        yield from (layer[name] for name in MATRICES if name in layer)
    yield model.head.head_weight
    yield model.embedding
    for layer in layers:
        yield from (weight for name, weight in layer.items() if name not in MATRICES)
    yield model.head.kept_norm


def _lines(tensor: Tensor) -> int:
    return (tensor.nbytes + LINE - 1) // LINE * LINE
