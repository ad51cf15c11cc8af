"""An exit: layers [0, E) of a model, some draft layers that only drafting uses, a norm, and a head."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerskip_kernels import LayerWeights
from layerskip_kernels.formats import FORMATS, dequantize, quantize
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, layer_shapes

from .. import registry
from .._imports import need
from .files import load_tensors, metadata_integer, save_tensors
from .head import EarlyExitHead, ExitWeights, check_token_ids

if TYPE_CHECKING:
    from .model import LayerSkipModel


FILE_NAME = "exit.safetensors"
FORMAT = "1"
PACKED = "int8"
"""The format of draft layers whose head drafts in int8, too."""
_FINGERPRINT = "model_fingerprint"
_DRAFT_LAYER = re.compile(r"blocks\.([0-9]{1,9})\.(\w+)")


class Exit:
    """What drafts for a model that stays as it is: its layers [0, E), then draft layers, a norm and a head of its own.

    Verification goes on from the state after layer E, before the draft layers, so an exit does not change the model's
    tokens. Without draft layers, and with the model's norm, it is LayerSkip's exit.

    Parameters
    ----------
    exit_layer : int
        E, in 1 … L - 1.
    norm_weight : Tensor [D]
        Of the norm before the head.
    num_layers, vocab_size : int
        L and V of the model.
    draft_layers : sequence of LayerWeights
        Decoder layers of the shapes of the model's own.
    token_ids : Tensor [S], int64, optional
        The tokens worth drafting, sorted, each once; by default all.
    head_down, head_up : Tensor [r, D] and [V, r], optional
        The rows of the draft head are those of ``W + head_up @ head_down``, where W is the model's head.
    model_fingerprint : str, optional
        `fingerprint` of the model that it was trained for.

    Raises
    ------
    ValueError, TypeError
        With the offending value.
    """

    def __init__(
        self,
        exit_layer: int,
        norm_weight: Tensor,
        num_layers: int,
        vocab_size: int,
        draft_layers: tuple[LayerWeights, ...] | list[LayerWeights] = (),
        token_ids: Tensor | None = None,
        head_down: Tensor | None = None,
        head_up: Tensor | None = None,
        model_fingerprint: str | None = None,
    ) -> None:
        if not 1 <= exit_layer < num_layers:
            raise ValueError(f"exit_layer must be in 1 … {num_layers - 1} for {num_layers} layers, got {exit_layer}")
        if norm_weight.dim() != 1 or not norm_weight.is_floating_point():
            raise ValueError(f"norm_weight is {norm_weight.dtype} {list(norm_weight.shape)}, expected floats [D]")
        if token_ids is not None:
            check_token_ids(token_ids, vocab_size)
        _check_low_rank(head_down, head_up, norm_weight.numel(), vocab_size)
        self.exit_layer, self.num_layers, self.vocab_size = exit_layer, num_layers, vocab_size
        self.norm_weight, self.token_ids = norm_weight, token_ids
        self.draft_layers = tuple(draft_layers)
        self.head_down, self.head_up = head_down, head_up
        self.model_fingerprint = model_fingerprint

    @property
    def num_draft_layers(self) -> int:
        return len(self.draft_layers)

    def of(self, model: LayerSkipModel, rows: str | Tensor | None = None) -> ExitWeights:
        """Bind the exit to a model: cast to its dtype and device; tensors that need no cast are shared.

        On the CPU, draft layers are in the format `PACKED` if the head is int8, so that a draft reads half the bytes.
        Matrices whose width is no multiple of the format's group stay as they are.

        Parameters
        ----------
        model : LayerSkipModel
        rows : {"full", "int8"} or Tensor [S], int64, optional
            The rows of the head: all in the model's dtype, all in int8, or those of some tokens in int8; by default
            those of ``token_ids`` in int8 or, without them, all in the model's dtype.

        Raises
        ------
        ValueError
            If the model has other sizes than the exit, or a weight to quantize is not finite.
        """
        self._check_model(model)
        like = model.head.norm_weight

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device=like.device, dtype=like.dtype)

        low_rank = None
        if self.head_down is not None and self.head_up is not None:
            low_rank = self.head_down.detach().to(like.device), self.head_up.detach().to(like.device)
        if rows is None:
            rows = "full" if self.token_ids is None else self.token_ids
        head = head_of(model.head, cast(self.norm_weight), low_rank, rows)
        draft_layers = [
            LayerWeights(**{name: cast(weight) for name, weight in _given(layer)}) for layer in self.draft_layers
        ]
        if head.scale is not None and like.is_cpu:
            draft_layers = [_packed(layer, number) for number, layer in enumerate(draft_layers)]
        return ExitWeights(self.exit_layer, head, tuple(draft_layers))

    def _check_model(self, model: LayerSkipModel) -> None:
        decoder = model.decoder
        self.check_sizes(model.num_layers, model.vocab_size, decoder.hidden_size)
        if not self.draft_layers:
            return
        first = decoder.template(0)
        heads = (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim)
        shapes = layer_shapes(decoder.hidden_size, *heads, first.gate.shape[0])  # a packed weight's is another
        self.check_draft_layers({name: None if getattr(first, name) is None else shapes[name] for name in shapes})

    def check_sizes(self, num_layers: int, vocab_size: int, hidden_size: int) -> None:
        """Raise ValueError if the exit is for a model with other L, V or D."""
        sizes = {
            "layers": (self.num_layers, num_layers),
            "tokens": (self.vocab_size, vocab_size),
            "values a state": (self.norm_weight.numel(), hidden_size),
        }
        for what, (mine, theirs) in sizes.items():
            if mine != theirs:
                raise ValueError(f"the exit is for a model of {mine} {what}, this one has {theirs}")

    def check_draft_layers(self, shapes: Mapping[str, Sequence[int] | None]) -> None:
        """Raise ValueError unless draft layers have these shapes; None for no tensor."""
        for number, layer in enumerate(self.draft_layers):
            for name, weight in layer._asdict().items():
                own = "none" if weight is None else list(weight.shape)
                shape = shapes[name]
                expected = "none" if shape is None else list(shape)
                if own != expected:
                    raise ValueError(
                        f"draft layer {number} of the exit: {name} has shape {own}, "
                        f"that of the model's layers {expected}"
                    )

    def save(self, path: str | Path) -> Path:
        """Write a file (``*.safetensors``), or ``exit.safetensors`` in a directory; whole or not at all."""
        tensors: dict[str, Tensor | None] = {"norm_weight": self.norm_weight, "token_ids": self.token_ids}
        tensors |= {"head_down": self.head_down, "head_up": self.head_up}
        for number, layer in enumerate(self.draft_layers):
            tensors |= {f"blocks.{number}.{name}": weight for name, weight in _given(layer)}
        metadata = {"format": FORMAT, "exit_layer": self.exit_layer, "num_blocks": self.num_draft_layers}
        metadata |= {"num_layers": self.num_layers, "vocab_size": self.vocab_size}
        if self.model_fingerprint is not None:
            metadata[_FINGERPRINT] = self.model_fingerprint
        return save_tensors(_file(path), "an exit", tensors, metadata)

    @classmethod
    def load(cls, source: str | Path) -> Exit:
        """Read what `save` wrote, from a file or a directory, or what a model that a package provides comes with.

        Parameters
        ----------
        source : str or Path
            A path, or the model's name (`layerskip.registry`).

        Raises
        ------
        FileNotFoundError, ModuleNotFoundError, ValueError
            If there is none, or it is not an exit; the message names the file.
        """
        return load_tensors(source, _file(source), "an exit", registry.exit, lambda *parts: cls(**_read(*parts)))

    @classmethod
    def shipped_for(cls, model: LayerSkipModel) -> Exit | None:
        """Load the exit that an installed package ships for a model with exactly these weights; None without one."""
        for path, metadata in _shipped(tuple(sys.path)):
            sizes = metadata["num_layers"], metadata["vocab_size"]
            if sizes == (str(model.num_layers), str(model.vocab_size)) and metadata[_FINGERPRINT] == fingerprint(model):
                return cls.load(path)
        return None


@functools.lru_cache(maxsize=1)
def _shipped(search_path: tuple[str, ...]) -> list[tuple[Path, dict[str, str]]]:
    """Files and metadata of the exits that packages on ``search_path`` ship, if they name the model by its weights."""
    found = []
    for name in registry.names(registry.MODELS):
        try:
            path = registry.shipped_exit(name)
        except (ImportError, ValueError) as error:
            warnings.warn(f"the exit of the installed model {name!r} is not used: {error}", stacklevel=4)
            continue
        if path is not None and path.is_file():
            with need("safetensors", "reading an exit").safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
            if _FINGERPRINT in metadata:
                found.append((path, metadata))
    return found


_SAMPLES = 64  # values at either end of a weight


def fingerprint(model: LayerSkipModel) -> str | None:
    """Digest of some values of every layer's weights in bf16, in milliseconds; None for packed weights.

    Models that were trained differently differ in it. It is the same whether weights are loaded in fp32 or bf16.
    """
    digest = hashlib.sha256()
    for weight in model.decoder.layer_weights(0, model.num_layers):
        if not weight.is_floating_point() or weight.itemsize < 2:
            return None
        values = weight.detach().reshape(-1)
        values = torch.cat([values[:_SAMPLES], values[-_SAMPLES:]]).to("cpu", torch.bfloat16)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _given(layer: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a draft layer has, by name."""
    return ((name, weight) for name, weight in layer._asdict().items() if weight is not None)


def _packed(layer: LayerWeights, number: int) -> LayerWeights:
    """A draft layer with its matrices in the format `PACKED`, if their widths allow it."""
    changed = {}
    for name, weight in _given(layer):
        if weight.dim() == 2 and weight.shape[1] % FORMATS[PACKED].group_size == 0:
            try:
                changed[name] = quantize(weight, PACKED)
            except ValueError as error:
                raise ValueError(f"draft layer {number} of the exit: {name}: {error}") from None
    return layer._replace(**changed)


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _read(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of `Exit` from a file's metadata and tensors."""
    if metadata["format"] != FORMAT:
        raise ValueError(f"format {metadata['format']!r}, this version reads {FORMAT!r}")
    found: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith("blocks.")]:
        match = _DRAFT_LAYER.fullmatch(name)
        if match is None or match[2] not in LayerWeights._fields:
            raise ValueError(f"unknown tensor {name}")
        found.setdefault(int(match[1]), {})[match[2]] = tensors.pop(name)
    number_of_blocks = metadata_integer(metadata, "num_blocks")  # the file's word for draft layers
    if len(found) != number_of_blocks or sorted(found) != list(range(len(found))):
        raise ValueError(f"num_blocks is {number_of_blocks}, there are blocks {sorted(found)}")
    for number, weights in found.items():
        for name in REQUIRED_WEIGHTS:
            if name not in weights:
                raise ValueError(f"it has no blocks.{number}.{name}")
    for name in tensors:
        if name not in ("norm_weight", "token_ids", "head_down", "head_up"):
            raise ValueError(f"unknown tensor {name}")
    sizes = {name: metadata_integer(metadata, name) for name in ("exit_layer", "num_layers", "vocab_size")}
    draft_layers = [LayerWeights(**found[number]) for number in sorted(found)]
    own = {"model_fingerprint": metadata.get(_FINGERPRINT)}
    return {"norm_weight": tensors.pop("norm_weight"), "draft_layers": draft_layers, **sizes, **tensors, **own}


def _check_low_rank(down: Tensor | None, up: Tensor | None, hidden_size: int, vocab_size: int) -> None:
    if down is None and up is None:
        return
    shapes = [None if one is None else list(one.shape) for one in (down, up)]
    rank = shapes[0][0] if shapes[0] else 0
    if rank < 1 or shapes != [[rank, hidden_size], [vocab_size, rank]]:
        raise ValueError(
            f"head_down and head_up have shapes {shapes[0]} and {shapes[1]}, "
            f"expected [r, {hidden_size}] and [{vocab_size}, r]"
        )


def head_of(
    full: EarlyExitHead, norm_weight: Tensor, low_rank: tuple[Tensor, Tensor] | None, rows: str | Tensor
) -> EarlyExitHead:
    """A model's head with another norm, a low-rank correction, and selected rows (`Exit.of`)."""
    if isinstance(rows, str) and rows not in ("full", "int8"):
        raise ValueError(f"rows must be 'full', 'int8' or token ids, got {rows!r}")
    weight: Tensor = full.head_weight
    if isinstance(rows, str) and rows == "full":
        if low_rank is not None:
            plain = dequantize(weight, norm_weight.shape[0])
            weight = torch.addmm(plain, low_rank[1].float(), low_rank[0].float()).to(norm_weight.dtype)
        return EarlyExitHead(norm_weight, weight, full.eps)
    return EarlyExitHead(norm_weight, weight, full.eps).quantize(None if isinstance(rows, str) else rows, low_rank)
