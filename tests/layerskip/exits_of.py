"""Random exits for the small models of `helpers`."""

from __future__ import annotations

import copy
from typing import Any

import torch

from layerskip import Exit, LayerSkipModel
from layerskip.models.architectures import ARCHITECTURES
from layerskip_kernels import LayerWeights


def random_exit(
    model: LayerSkipModel,
    exit_layer: int = 2,
    num_draft_layers: int = 1,
    token_ids: list[int] | None = None,
    rank: int = 0,
    seed: int = 0,
) -> Exit:
    """An exit whose draft layers and norm are as large as the model's own, so that each changes its drafts."""
    generator = torch.Generator().manual_seed(seed)

    def like(weight: torch.Tensor) -> torch.Tensor:
        values = torch.randn(weight.shape, generator=generator)
        return (values * weight.shape[1] ** -0.5 if weight.dim() == 2 else 1 + 0.3 * values).to(weight.dtype)

    layer = model.decoder.layer(0)
    draft_layers = [
        LayerWeights(*(None if one is None else like(one) for one in layer)) for _ in range(num_draft_layers)
    ]
    norm = like(model.head.norm_weight)
    down = up = None
    if rank:
        down = torch.randn(rank, norm.numel(), generator=generator) * norm.numel() ** -0.5
        up = torch.randn(model.vocab_size, rank, generator=generator) * rank**-0.5
    chosen = None if token_ids is None else torch.tensor(token_ids)
    return Exit(exit_layer, norm, model.num_layers, model.vocab_size, draft_layers, chosen, down, up)


def copied_exit(model: LayerSkipModel, exit_layer: int = 2, num_draft_layers: int = 1) -> Exit:
    """An exit whose draft layers are the layers that follow it: with all of them every draft is right."""
    draft_layers = [model.decoder.layer(exit_layer + number) for number in range(num_draft_layers)]
    return Exit(exit_layer, model.head.norm_weight, model.num_layers, model.vocab_size, draft_layers)


class SlowExit:
    """An exit as transformers computes it, over the whole sequence at once and with no cache.

    Parameters
    ----------
    hf_model : transformers.PreTrainedModel
        In fp32.
    exit_ : Exit
        With draft layers.
    """

    def __init__(self, hf_model: Any, exit_: Exit) -> None:
        self._model, self._exit_layer = hf_model, exit_.exit_layer
        config = copy.deepcopy(hf_model.config)
        config.num_hidden_layers, config.tie_word_embeddings = exit_.num_draft_layers, False
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: exit_.num_draft_layers]
        self._draft_layers = type(hf_model)(config).eval()
        paths = ARCHITECTURES[config.model_type].layer_paths
        weights = {
            f"model.layers.{number}.{paths[name]}": weight
            for number, layer in enumerate(exit_.draft_layers)
            for name, weight in layer._asdict().items()
            if weight is not None
        }
        head = hf_model.lm_head.weight.detach()
        if exit_.head_down is not None:
            head = head + exit_.head_up @ exit_.head_down
        weights |= {"model.norm.weight": exit_.norm_weight, "lm_head.weight": head}
        missing = self._draft_layers.load_state_dict(weights, strict=False)
        assert missing.missing_keys == ["model.embed_tokens.weight"]
        assert not missing.unexpected_keys

    @torch.no_grad()
    def margins(self, tokens: list[int], drafts: list[int]) -> list[float]:
        """How far the logit of each draft after ``tokens`` is below the largest one; each follows those before it."""
        ids = torch.tensor([[*tokens, *drafts[:-1]]])
        states = self._model(ids, output_hidden_states=True, use_cache=False).hidden_states[self._exit_layer]
        logits = self._draft_layers(inputs_embeds=states, use_cache=False).logits[0, -len(drafts) :]
        return (logits.amax(-1) - logits.gather(-1, torch.tensor(drafts)[:, None])[:, 0]).tolist()
