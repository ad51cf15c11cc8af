"""The draft model: the target's first layers, norm and head, or a trained exit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from .. import Exit
from . import sampling
from .draft_layers import make_draft_layers
from .head import make_head
from .rows import LastRows
from .settings import Settings

logger = init_logger("vllm.layerskip")


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class FirstLayers(nn.Module):
    """Layers [0, E) of a target, and the draft layers of an exit; the part that vLLM compiles.

    The hash of ``vllm_config`` must distinguish exits, see `_compiled_as`. Without ``norm`` the head norms.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        embed_tokens: nn.Module,
        layers: Iterable[nn.Module],
        norm: nn.Module | None,
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """States [R, D] after the last of the layers."""
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        if self.norm is None:
            return hidden + residual
        hidden, _ = self.norm(hidden, residual)
        return hidden


class LayerSkipDraft(nn.Module):
    """The model that vLLM's draft model proposer runs, one token a call and sequence.

    The keys and values that it writes are the target's own: the same layers, in the same cache, for the same tokens.
    Verification writes them again. The draft layers of an exit have keys and values of their own, of every token.
    """

    def __init__(self, target: Any, vllm_config: VllmConfig, prefix: str, settings: Settings) -> None:
        super().__init__()
        self.config = target.config
        self._target = (target,)  # a tuple, so that it is no submodule and its parameters are not counted twice
        exit = None if settings.exit is None else Exit.load(settings.exit)
        draft_layers = nn.ModuleList() if exit is None else make_draft_layers(target, exit, vllm_config, prefix)
        layers = [*target.model.layers[: settings.exit_layer], *draft_layers]
        attentions = [module for layer in layers for module in layer.modules() if isinstance(module, Attention)]
        self._names = [attention.layer_name for attention in attentions]
        self._placeholder = _stand_in(attentions[0], vllm_config, prefix)
        self._norm = _norm(target, exit)
        self._head = make_head(target, self._norm, settings.draft_head, exit)
        _check_correction(exit, self._head, vllm_config)
        norm = self._norm if self._head is None else None
        config = _compiled_as(vllm_config, settings.exit_layer, len(draft_layers), norm is not None)
        with set_current_vllm_config(config):
            self.inner = FirstLayers(
                vllm_config=config, prefix=prefix, embed_tokens=target.model.embed_tokens, layers=layers, norm=norm
            )
        # Draft layers need every row. The runner of version 2 does not mark the slots of rejected rows, by which the
        # last valid one is found.
        every_row = len(draft_layers) > 0 or vllm_config.use_v2_model_runner
        self._last_rows = None if every_row else LastRows(vllm_config, self._names)
        if settings.mend_cpu_sampling:
            sampling.mend()
        logger.info(
            "LayerSkip: layers 0 to %d of %d and %d draft layers draft %d tokens a round; head: %s",
            settings.exit_layer - 1,
            len(target.model.layers),
            len(draft_layers),
            vllm_config.speculative_config.num_speculative_tokens,
            settings.draft_head,
        )

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """States [R, D] of the drafts, normed if vLLM's own head takes them."""
        context = get_forward_context()
        if not context.attn_metadata:  # a run that measures memory or warms up
            return self.inner(input_ids, positions)
        metadata, slots = context.attn_metadata[self._placeholder], context.slot_mapping[self._placeholder]
        if self._last_rows is None or not self._last_rows.worth_it(metadata):
            return self._run(input_ids, positions, metadata, slots)
        rows, metadata, slots = self._last_rows.of(metadata, slots, positions)
        hidden = self._run(input_ids[rows], positions[rows], metadata, slots)
        whole = hidden.new_zeros(input_ids.shape[0], hidden.shape[1])
        whole[rows] = hidden
        return whole

    def _run(self, input_ids: Tensor, positions: Tensor, metadata: Any, slots: Tensor) -> Tensor:
        """Run the layers; their attention finds its metadata by its names in the target."""
        context = dataclasses.replace(
            get_forward_context(),
            attn_metadata=dict.fromkeys(self._names, metadata),
            slot_mapping=dict.fromkeys(self._names, slots),
        )
        with override_forward_context(context):
            return self.inner(input_ids, positions)

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """Logits [R, V] of the target's own head, for drafts that are sampled."""
        (target,) = self._target
        return target.compute_logits(hidden if self._head is None else self._norm(hidden))

    def get_top_tokens(self, hidden: Tensor) -> Tensor:
        """Tokens [R], which vLLM uses instead of logits with ``use_local_argmax_reduction``."""
        (target,) = self._target
        return target.get_top_tokens(hidden) if self._head is None else self._head(hidden)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self._target[0].model.embed_input_ids(input_ids)


def _stand_in(attention: Attention, vllm_config: VllmConfig, prefix: str) -> str:
    """Register an attention layer that is never run; return its name.

    vLLM finds a drafter's cache group by the attention layers that loading it adds. This one shares the cache of the
    target's first layer, so it belongs to that group and allocates nothing.
    """
    name = f"{prefix or 'draft_model'}.layers.0.self_attn.attn"
    stand_in = copy.copy(attention)
    stand_in.layer_name, stand_in.kv_sharing_target_layer_name = name, attention.layer_name
    vllm_config.compilation_config.static_forward_context[name] = stand_in
    return name


def _norm(target: Any, exit: Exit | None) -> Any:
    """The norm before the draft's head: the target's own, or a copy with an exit's weight."""
    if exit is None:
        return target.model.norm
    norm = copy.deepcopy(target.model.norm)
    norm.weight.data.copy_(exit.norm_weight)
    return norm


def _check_correction(exit: Exit | None, head: Any, vllm_config: VllmConfig) -> None:
    """Refuse to draft with vLLM's head if an exit corrects the head's rows."""
    sampled = vllm_config.speculative_config.draft_sample_method == "probabilistic"
    if exit is not None and exit.head_down is not None and (head is None or sampled):
        asked = "draft_sample_method 'probabilistic'" if sampled else "draft_head 'vllm'"
        raise NotImplementedError(f"{asked} drafts with the model's own head, which the exit corrects")


def _compiled_as(vllm_config: VllmConfig, exit_layer: int, draft_layers: int, norm: bool) -> VllmConfig:
    """Add what is compiled to the configuration's hash, so that vLLM's cache of graphs distinguishes exits."""
    config = copy.copy(vllm_config)
    compiled = {"exit_layer": exit_layer, "draft_layers": draft_layers, "norm": norm}
    config.additional_config = {**dict(vllm_config.additional_config or {}), "layerskip": compiled}
    return config
