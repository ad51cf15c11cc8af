"""Random exits for the small models of `helpers`."""

from __future__ import annotations

import torch

from layerskip import Exit, LayerSkipModel
from layerskip_kernels import LayerWeights


def random_exit(
    model: LayerSkipModel,
    exit_layer: int = 2,
    num_blocks: int = 1,
    token_ids: list[int] | None = None,
    rank: int = 0,
    seed: int = 0,
) -> Exit:
    """An exit whose blocks and norm are of the size of the model's own layers, so that each counts for its drafts."""
    generator = torch.Generator().manual_seed(seed)

    def like(weight: torch.Tensor) -> torch.Tensor:
        values = torch.randn(weight.shape, generator=generator)
        return (values * weight.shape[1] ** -0.5 if weight.dim() == 2 else 1 + 0.3 * values).to(weight.dtype)

    layer = model.decoder.layer(0)
    blocks = [LayerWeights(*(None if one is None else like(one) for one in layer)) for _ in range(num_blocks)]
    norm = like(model.head.norm_weight)
    down = up = None
    if rank:
        down = torch.randn(rank, norm.numel(), generator=generator) * norm.numel() ** -0.5
        up = torch.randn(model.vocab_size, rank, generator=generator) * rank**-0.5
    chosen = None if token_ids is None else torch.tensor(token_ids)
    return Exit(exit_layer, norm, model.num_layers, model.vocab_size, blocks, chosen, down, up)
