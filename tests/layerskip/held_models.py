"""Models as transformers holds them once a quantizer's package has put its modules in: the same classes and tensors.

The packages need a GPU, or are not available. The names of classes and tensors, and what their loading does to these,
are those of gptqmodel 7.7, autoawq 0.2.9, compressed-tensors 0.20 and transformers 5.24.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

DECOMPRESSING = "compressed_tensors.quantization.lifecycle.forward"
MOVING = "compressed_tensors.offload.module"


def held(directory: Path, meant: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a directory as transformers holds it.

    Parameters
    ----------
    directory : Path
        What `quantized_checkpoints.write` wrote.
    meant : torch.nn.Module
        What that returned: the modules compute what its weights give.
    kind : str
        "compressed", "fp8", or the full name of a package's class.
    dtype : torch.dtype
        Of what is not quantized.
    """
    model = type(meant)(meant.config).to(dtype)
    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict({name: one for name, one in tensors.items() if "proj" not in name}, strict=False)
    model.tie_weights()
    model.config.quantization_config = json.loads((directory / "config.json").read_text())["quantization_config"]
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            own = {key.rpartition(".")[2]: tensors[key] for key in tensors if key.startswith(f"{name}.")}
            weight = meant.get_submodule(name).weight.detach().to(dtype)
            if kind == "compressed":
                compress(module, own, weight)
            else:
                model.set_submodule(name, fine_grained(module, own) if kind == "fp8" else packaged(kind, own, weight))
    return model.eval()


def packaged(kind: str, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> nn.Module:
    """A module of a class of this name, with these tensors as buffers."""
    home, _, name = kind.rpartition(".")
    module: Any = type(name, (nn.Module,), {"__module__": home, "forward": lambda self, x: F.linear(x, weight)})()
    for key, tensor in tensors.items():
        module.register_buffer(key, tensor.clone())
    return module


def second_convention(model: nn.Module) -> Any:
    """What gptqmodel does to zero points of the first convention, for kernels that take the second."""
    for module in model.modules():
        if hasattr(module, "qzeros"):
            module.qzeros += 0x11111111
            module.qzero_format = lambda: 2
    return model


def fine_grained(plain: Any, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A linear layer of transformers' fp8."""
    module = FP8Linear(plain.in_features, plain.out_features, (64, 128))
    for key, tensor in tensors.items():
        setattr(module, key, nn.Parameter(tensor, requires_grad=False))
    return module


def compress(module: Any, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    """What compressed-tensors does to a linear layer: other parameters, and a forward in front of its own."""
    del module.weight
    for key, tensor in tensors.items():
        module.register_parameter(key, nn.Parameter(tensor.clone(), requires_grad=False))
    module.meant, module.quantization_status = [weight], "compressed"
    module.forward = _defined_in(DECOMPRESSING, module).__get__(module)


def decompress(model: nn.Module) -> None:
    """What its hook does before the first forward: scales stay, beside a plain weight, and every forward is wrapped."""
    for module in model.modules():
        if hasattr(module, "meant"):
            for name in ("weight_packed", "weight"):
                module._parameters.pop(name, None)
            module.weight, module.quantization_status = nn.Parameter(module.meant[0]), "decompressed"
        if type(module).forward is not nn.Module.forward:  # a list has none
            module._original_forward_func = module.forward.__func__
            module.forward = _defined_in(MOVING, module).__get__(module)


def _defined_in(home: str, module: nn.Module) -> Callable[..., torch.Tensor]:
    """A forward whose globals are those of a module of Python, and whose name is that of the class's own."""
    scope: dict[str, Any] = {"__name__": home}
    exec("def forward(self, *args, **named):\n    return type(self).forward(self, *args, **named)", scope)
    return functools.wraps(type(module).forward)(scope["forward"])


def generated(model: transformers.PreTrainedModel, prompt: torch.Tensor, **options: Any) -> list[int]:
    """The new tokens of ``model.generate``, greedily."""
    out = model.generate(prompt, do_sample=False, pad_token_id=0, **options)
    return list(out[0, prompt.shape[1] :].tolist())
