"""A model of transformers with what packed weights stand for: the truth that a packed model is compared with."""

from __future__ import annotations

from typing import Any

import torch

from layerskip_kernels.formats import dequantize

from .checkpoints import frequency_factors
from .model import LayerSkipModel
from .named import EMBEDDING, HEAD, named_weights


@torch.no_grad()
def dequantized(model: LayerSkipModel, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers of the same weights, all of them plain.

    Parameters
    ----------
    model : LayerSkipModel
        Made of a model of transformers or a checkpoint; what an exit adds is left out.
    dtype : torch.dtype

    Returns
    -------
    transformers.PreTrainedModel
    """
    import transformers

    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    shapes = {name: parameter.shape for name, parameter in made.named_parameters(remove_duplicate=False)}
    state = {}
    for name, weight in named_weights(model).items():
        shape = shapes[name]
        is_vector = len(shape) == 1  # others are matrices, or stacks of them
        plain = weight.to(dtype) if is_vector else dequantize(weight.flatten(0, -2), shape[-1], dtype).view(shape)
        state[name] = plain.clone() if plain.data_ptr() == weight.data_ptr() else plain
    if HEAD not in state:
        state[HEAD] = state[EMBEDDING]
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    rotary = made.model.rotary_emb
    made.model.rotary_emb = type(rotary)(model.config).to(model.device)
    for module in made.modules():
        if hasattr(module, "scalar_embed_scale"):  # of Gemma's embedding, whose tensor is in no checkpoint
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=model.device)
    factors = frequency_factors(model)
    if factors is not None:  # which only a file of one rotary embedding has
        made.model.rotary_emb.inv_freq = model.decoder.inv_freq.to(model.device)
    made.generation_config = model.generation_config or made.generation_config
    return made.eval()
