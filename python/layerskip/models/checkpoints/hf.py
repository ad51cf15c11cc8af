"""Quantized checkpoints in safetensors: this library's own, GPTQ, AWQ, compressed-tensors, fine-grained fp8."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerskip_kernels.formats import FORMATS, Format, format_of, pack

from ...registry import METHOD
from ..files import Field, Fields, ModelFileError, check_fields, reading
from ..hf_checks import unsupported
from .base import Checkpoint, Tensors

SIZES = (128, 32)  # of the groups of packed weights, the best first


def check_group_size(method: str, size: object) -> None:
    """Refuse a ``group_size`` that packed weights cannot have; -1 or None is one scale per output."""
    if size not in (None, -1) and not (isinstance(size, int) and size > 0 and size % SIZES[-1] == 0):
        raise unsupported(f"{method} with group_size {size!r}", "32, 64, 128, other multiples of 32, and -1")


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 words [A, B · bits / 32] to unsigned integers [A, B], lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack([octets & 15, octets >> 4], dim=-1).flatten(1)


def packed_integers(
    name: str, bits: int, values: Tensor, scale: Tensor, zero: Tensor | None, group_size: object
) -> Tensor:
    """Pack ``scale · (values - zero)``: values [N, D] uint8 of 4 or 8 bits, scale and zero [N, G] of G groups a row.

    Without ``zero`` it is the middle of the range. ``group_size`` is the configuration's; None or -1 is one group a
    row. ModelFileError if the groups are no multiple of 32 weights or not as many as configured, or 8-bit weights have
    zero points.
    """
    middle = 1 << (bits - 1)
    if zero is not None and bool((zero == middle).all()):
        zero = None
    if zero is not None and bits == 8:
        raise ModelFileError(f"{name} has 8-bit weights with zero points; supported: symmetric ones")
    size = _group_size(name, values.shape[1], scale.shape[1], group_size)
    form = FORMATS[
        ("int8" if bits == 8 else "int4" if zero is None else "int4_zero") + ("_g128" if size == 128 else "")
    ]
    scale = scale.float()
    least = None if zero is None else _repeated(-scale * zero.float(), form, values.shape[1])
    return _packed(name, form, (values ^ 128).view(torch.int8) if bits == 8 else values, scale, least)


def packed_floats(name: str, values: Tensor, scale: Tensor, group_size: object) -> Tensor:
    """Pack ``scale · values``: values [N, D] in float8_e4m3fn, scale [N, G] of G groups a row."""
    size = _group_size(name, values.shape[1], scale.shape[1], group_size)
    return _packed(name, FORMATS["fp8_g128" if size == 128 else "fp8"], values, scale.float(), None)


def _packed(name: str, form: Format, values: Tensor, scale: Tensor, least: Tensor | None) -> Tensor:
    scale = _repeated(scale, form, values.shape[1])
    try:
        return pack(form, values.unflatten(1, (-1, form.group_size)), scale, least)
    except ValueError as error:
        raise ModelFileError(f"{name}: {error}") from None


def _group_size(name: str, width: int, groups: int, configured: object) -> int:
    """The packed weight's group size: a group of the checkpoint becomes several with equal scales."""
    given = configured if isinstance(configured, int) and configured > 0 else width
    if groups != 1 and groups * given != width:
        raise ModelFileError(
            f"{name} has {groups} groups in rows of {width} weights, its quantization_config says groups of {given}"
        )
    for size in SIZES:
        if width % groups == 0 and width // groups % size == 0:
            return size
    raise ModelFileError(
        f"{name} has {groups} groups in rows of {width} weights; supported: groups of a multiple of 32"
    )


def _repeated(numbers: Tensor, form: Format, width: int) -> Tensor:
    return numbers.repeat_interleave(width // form.group_size // numbers.shape[1], dim=1)


VERSION = 1
ROPE_FACTORS = "rope_freqs.weight"
"""Name of the tensor of divisors of the rotary frequencies, if these differ from the configuration's."""


def own_settings(formats: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model with weights of these formats."""
    return {"quant_method": METHOD, "version": VERSION, "formats": list(formats)}


class OwnCheckpoint(Checkpoint):
    """This library's own checkpoints: tensors of bytes are packed weights, tensors of floats plain ones."""

    modules = ("layerskip.transformers.packed.PackedLinear", "layerskip.transformers.packed.PackedEmbedding")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        version, self._formats = settings.get("version"), settings.get("formats") or ()
        if version != VERSION:
            raise unsupported(f"version {version!r} of quant_method {METHOD}", f"version {VERSION}")
        for name in self._formats:
            if name not in FORMATS:
                raise unsupported(f"the weight format {name!r}", ", ".join(FORMATS))

    def read_from(self, tensors: Tensors) -> None:
        super().read_from(tensors)
        if ROPE_FACTORS in self.files:
            self.frequency_factors = self.files.read(ROPE_FACTORS, [None])

    def is_packed(self, module: str) -> bool:
        name = self._name(module)
        return name in self.files and self.files.is_bytes(name)

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        name = self._name(module)
        weight = self.files.read(name, [*shape[:-1], None], torch.uint8)
        try:
            form = format_of(weight, shape[-1])
        except ValueError as error:
            raise ModelFileError(f"{name}: {error}") from None
        if form.name not in self._formats:
            raise ModelFileError(f"{name} is packed in {form.name}, its config.json says {', '.join(self._formats)}")
        return weight

    def _name(self, module: str) -> str:
        """A stack of experts is a parameter, not a module with a weight."""
        return module if module in self.files else f"{module}.weight"


_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # positions of outputs 0 … 7 in a word


class AwqCheckpoint(Checkpoint):
    """4-bit weights in groups with zero points."""

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
        rows, width = shape
        scale = self.files.read(f"{module}.scales", [None, rows])
        words = self.files.read(f"{module}.qweight", [width, rows // 8], torch.int32)
        zeros = self.files.read(f"{module}.qzeros", [scale.shape[0], rows // 8], torch.int32)
        name, group = f"{module}.qweight", self._group_size
        return packed_integers(name, 4, _in_order(words), scale.t(), _in_order(zeros), group)


def _in_order(words: Tensor) -> Tensor:
    return unpacked(words, 4).unflatten(1, (-1, 8))[:, :, list(_PLACES)].flatten(1).t().contiguous()


BITS = (4, 8)
_CONVENTIONS = {"gptq": 1, "gptq_v2": 0}  # what to add to a stored zero point


class GptqCheckpoint(Checkpoint):
    """4-bit weights, or 8-bit ones without zero points, in groups or per output, without act-order."""

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
        """Some kernels of gptqmodel convert the zero points to the second convention when loading."""
        kernels: Iterable[Any] = (module for module in model.modules() if hasattr(module, "qzero_format"))
        if any(kernel.qzero_format() == 2 for kernel in kernels):
            self._less = _CONVENTIONS["gptq_v2"]

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        (rows, width), bits = shape, self._bits
        scale = self.files.read(f"{module}.scales", [None, rows])
        groups, group = scale.shape[0], self.settings.get("group_size")
        self._check_order(module, width, groups)
        words = self.files.read(f"{module}.qweight", [width * bits // 32, rows], torch.int32)
        stored = self.files.read(f"{module}.qzeros", [groups, rows * bits // 32], torch.int32)
        zero = self._zero(f"{module}.qzeros", unpacked(stored, bits))
        return packed_integers(f"{module}.qweight", bits, unpacked(words.t(), bits), scale.t(), zero.t(), group)

    def _zero(self, name: str, stored: Tensor) -> Tensor:
        """Zero points; of symmetric weights the middle, which some writers of the first convention store as it is."""
        largest = (1 << self._bits) - 1
        if not self.settings.get("sym"):
            return (stored + self._less) & largest
        middle = (largest + 1) // 2
        for value in (middle - self._less, middle):
            if bool((stored == value).all()):
                return torch.full_like(stored, middle)
        raise ModelFileError(f"{name} is not the middle of the range, though quantization_config says sym")

    def _check_order(self, module: str, width: int, groups: int) -> None:
        """Refuse act-order."""
        name = f"{module}.g_idx"
        if name not in self.files or width % groups:
            return
        found = self.files.read(name, [width])
        if not torch.equal(found.long(), torch.arange(width) // (width // groups)):
            raise unsupported(f"{name} in another order than the inputs' (act-order)", "desc_act false")


# The kind of the stored values, and the supported numbers of bits.
_FORMATS = {
    "pack-quantized": ("int", (4, 8)),
    "int-quantized": ("int", (8,)),
    "float-quantized": ("float", (8,)),
    "naive-quantized": ("float", (8,)),
}
_STRATEGIES = ("group", "channel", "tensor", "block")


class CompressedTensorsCheckpoint(Checkpoint):
    """compressed-tensors; activations are not quantized, whatever the configuration says."""

    stem = ".weight_scale"
    modules = ("torch.nn.modules.linear.Linear",)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise unsupported(f"compressed-tensors with sparsity {sparsity!r}", "dense")
        if (settings.get("transform_config") or {}).get("config_groups"):
            raise unsupported("compressed-tensors with transforms (transform_config)", "weights without them")
        groups = settings.get("config_groups") or {}
        self._groups = [group for group in groups.values() if group is not None]
        if not self._groups:
            raise unsupported("compressed-tensors without config_groups", "groups with weights")
        for group in self._groups:
            _check(self._format(group), group.get("weights") or {})
            for target in _targets(group):
                with reading(f"target {target!r}", "config_groups"):
                    re.compile(target)

    def _format(self, group: Mapping[str, Any]) -> str:
        return str(group.get("format") or self.settings.get("format"))

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        group = self._group_of(module)
        name, bits = f"{module}.weight", group["weights"]["num_bits"]
        scale = self._scale(name, shape, group["weights"])
        blocks = group["weights"]["strategy"] == "block"
        size = group["weights"]["block_structure"][1] if blocks else group["weights"].get("group_size")
        if group["weights"]["type"] == "float":
            return packed_floats(name, self.files.read(name, shape, torch.float8_e4m3fn), scale, size)
        if self._format(group) == "int-quantized":
            values = self.files.read(name, shape, torch.int8).view(torch.uint8) ^ 128
        else:
            words = self.files.read(f"{name}_packed", [shape[0], -(-shape[1] * bits // 32)], torch.int32)
            values = unpacked(words, bits)[:, : shape[1]]
        return packed_integers(name, bits, values, scale, self._zero(name, bits, scale), size)

    def _group_of(self, module: str) -> Mapping[str, Any]:
        """The first group that targets a linear layer, by name, by pattern, or as "Linear"."""
        for group in self._groups:
            for target in _targets(group):
                named = re.match(target[3:], module) if target.startswith("re:") else module.endswith(target)
                if named or target == "Linear":
                    return group
        raise ModelFileError(f"{module} is quantized, but no group of config_groups has it for a target")

    def _scale(self, name: str, shape: Sequence[int], weights: Mapping[str, Any]) -> Tensor:
        stored = self.files.read(f"{name}_scale", None)
        if weights["strategy"] == "block":
            rows = weights["block_structure"][0]
            return stored.repeat_interleave(rows, dim=0)[: shape[0]]
        if stored.numel() == 1:
            return stored.reshape(1, 1).expand(shape[0], 1)
        if stored.dim() != 2 or stored.shape[0] != shape[0]:
            raise ModelFileError(f"{name}_scale has shape {list(stored.shape)}, expected [{shape[0]}, *]")
        return stored

    def _zero(self, name: str, bits: int, scale: Tensor) -> Tensor | None:
        """Zero points [N, G], unsigned like the values."""
        name, middle = f"{name}_zero_point", 1 << (bits - 1)
        if name not in self.files:
            return None
        stored = self.files.read(name, [None, scale.shape[1]])
        if stored.dtype != torch.int32:
            return stored.reshape(-1, scale.shape[1]).expand_as(scale).int() + middle
        return unpacked(stored.t(), bits)[:, : scale.shape[0]].t()


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets") or []
    return [targets] if isinstance(targets, str) else targets


def _check(form: str, weights: Mapping[str, Any]) -> None:
    """Refuse settings that are not supported, by name."""
    if form not in _FORMATS:
        raise unsupported(f"compressed-tensors in the format {form!r}", ", ".join(_FORMATS))
    kind, bits = _FORMATS[form]
    found = (weights.get("type"), weights.get("num_bits"))
    if found[0] != kind or found[1] not in bits:
        what = " or ".join(f"{kind} of {one} bits" for one in bits)
        raise unsupported(f"compressed-tensors {form} with {found[0]} of {found[1]} bits", what)
    if weights.get("strategy") not in _STRATEGIES:
        raise unsupported(f"compressed-tensors with the strategy {weights.get('strategy')!r}", ", ".join(_STRATEGIES))
    block = weights.get("block_structure")
    if weights["strategy"] == "block" and not (isinstance(block, list) and len(block) == 2):
        raise unsupported(f"compressed-tensors with block_structure {block!r}", "[rows, columns]")
    if found == ("int", 8) and not weights.get("symmetric", True):
        raise unsupported("compressed-tensors with 8-bit weights that are not symmetric", "symmetric true")
    check_group_size("compressed-tensors", weights.get("group_size"))
    if weights.get("actorder") in ("group", True):
        raise unsupported("compressed-tensors with actorder 'group'", "actorder null, 'weight' and 'static'")


class FineGrainedCheckpoint(Checkpoint):
    """fp8 in blocks, as transformers writes it; activations are not quantized."""

    stem = ".weight_scale_inv"
    modules = ("transformers.integrations.finegrained_fp8.FP8Linear",)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        block = settings.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and block[1] % 32 == 0):
            raise unsupported(f"fp8 with weight_block_size {block!r}", "[rows, columns], the columns a multiple of 32")
        kind = settings.get("fmt", "e4m3")
        if kind != "e4m3":
            raise unsupported(f"fp8 with fmt {kind!r}", "e4m3")
        self._block = block

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        rows, columns = self._block
        places = [-(-shape[0] // rows), -(-shape[1] // columns)]
        scale = self.files.read(f"{module}.weight_scale_inv", places)
        values = self.files.read(f"{module}.weight", shape, torch.float8_e4m3fn)
        return packed_floats(f"{module}.weight", values, scale.repeat_interleave(rows, dim=0)[: shape[0]], columns)


LAYOUTS: dict[str, type[Checkpoint]] = {
    METHOD: OwnCheckpoint,
    "compressed-tensors": CompressedTensorsCheckpoint,
    "gptq": GptqCheckpoint,
    "awq": AwqCheckpoint,
    "fp8": FineGrainedCheckpoint,
}
"""The reader of a checkpoint by the ``quant_method`` of its ``quantization_config``."""
_ANY, _NAME, _NAMES = Field(int), Field(str), Field(str, many=True)
_SHAPE = Field(int, 1, 2**24, many=True)
SETTINGS: Mapping[str, Fields] = {
    METHOD: {"version": _ANY, "formats": _NAMES},
    "compressed-tensors": {
        "format": _NAME, "sparsity_config": {"format": _NAME}, "transform_config": {"config_groups": {}},
        "config_groups": {"*": {
            "format": _NAME, "targets": _NAMES,
            "weights": {
                "type": _NAME, "num_bits": _ANY, "strategy": _NAME, "symmetric": Field(bool), "group_size": _ANY,
                "block_structure": _SHAPE,
            },
        }},
    },
    "gptq": {
        "bits": _ANY, "group_size": _ANY, "sym": Field(bool), "desc_act": Field(bool), "dynamic": {},
        "checkpoint_format": _NAME, "format": _NAME,
    },
    "awq": {
        "bits": _ANY, "w_bit": _ANY, "group_size": _ANY, "q_group_size": _ANY, "version": _NAME, "format": _NAME,
        "backend": _NAME,
    },
    "fp8": {"weight_block_size": _SHAPE, "fmt": _NAME},
}  # fmt: skip
"""The fields of a ``quantization_config`` that are read."""
GGUF = "gguf"  # the quant_method of GGUF files that transformers has dequantized


def method_of(config: Any) -> str | None:
    """The ``quant_method`` of a configuration whose weights may be quantized; None if they are plain."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings.quant_method
    method = str(getattr(method, "value", method))
    return None if method == GGUF else method


def layout_of(method: str) -> type[Checkpoint]:
    """The reader of checkpoints of this ``quant_method``, or UnsupportedModelError."""
    if method not in LAYOUTS:
        raise unsupported(f"a model quantised with {method}", f"{', '.join(LAYOUTS)}, and plain weights")
    return LAYOUTS[method]


def checkpoint_of(config: Any) -> Checkpoint:
    """The reader of a configuration's checkpoint; UnsupportedModelError for an unknown method or setting."""
    settings = config.quantization_config
    given = settings if isinstance(settings, Mapping) else settings.to_dict()
    given = json.loads(json.dumps(given, default=str))  # with names in place of enums
    layout = layout_of(method := str(method_of(config)))
    check_fields(f"{config.name_or_path}: quantization_config", given, SETTINGS[method])
    return layout(given)
