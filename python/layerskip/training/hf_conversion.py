"""Make a Hugging Face causal LM compute its exits' losses and drop layers, and revert it.

Only ``forward`` of the model and of its decoder layers is replaced, on the instances. Parameters, their names and the
classes stay, so checkpoints, LoRA, DDP and FSDP work as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..models.architectures import check_config, norm_spec
from ..models.hf_checks import ORIGINAL_FORWARD
from .curriculum import LayerDropout, apply_to_samples
from .losses import ExitHeadLoss, target_rows

_KEY = "_layerskip_conversion"
REPORTED_ROWS = 256  # enough for a rate to within 3 % at two standard deviations


def _base(model: Any) -> Any:
    """The model inside a PEFT wrapper, or the model."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


class Conversion:
    """State of a converted model: the replaced methods, the layer dropout, the states of the running forward."""

    def __init__(self, model: Any, dropout: LayerDropout | None) -> None:
        self.model, self.dropout = model, dropout
        self.layers, norm = _decoder_parts(model)
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ValueError("the model's head has a bias; early-exit training takes heads without one")
        if dropout is not None and len(dropout.rates) != len(self.layers):
            raise ValueError(f"{len(dropout.rates)} dropout rates were given for {len(self.layers)} layers")
        self.vocabulary = int(head.weight.shape[0])
        self.loss = ExitHeadLoss(norm, head, _eps(norm), norm_spec(model.config))
        self._wanted: frozenset[int] = frozenset()
        self._dropping = False  # stays set after a forward: activation checkpointing reruns layers in the backward
        self._states: dict[int, Tensor] = {}
        self._replaced: list[tuple[nn.Module, Any]] = []
        for index, layer in enumerate(self.layers):
            self._replace(layer, self._layer_forward(index, layer, layer.forward))
        self._replace(model, self._model_forward(model.forward))

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._replaced.append((module, module.__dict__.get("forward")))
        setattr(forward, ORIGINAL_FORWARD, module.forward)
        module.forward = forward

    def undo(self) -> None:
        """Restore the replaced methods."""
        for module, own in self._replaced:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.forward = own

    def _layer_forward(self, index: int, layer: nn.Module, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._wanted and index >= max(self._wanted):
                return hidden_states  # above the deepest exit
            if self.dropout is not None and layer.training and self._dropping:
                samples = self.dropout.samples(index, hidden_states.shape[0])
                out = apply_to_samples(original, samples, hidden_states, *args, **kwargs)
            else:
                out = original(hidden_states, *args, **kwargs)
            if index + 1 in self._wanted:
                self._states[index + 1] = out
            return out

        return forward

    def _model_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)  # transformers' Trainer drops the columns that are not in its signature
        def forward(*args: Any, exit_layers: Sequence[int] | None = None, **kwargs: Any) -> Any:
            self._dropping = exit_layers is not None
            if exit_layers is None:
                return original(*args, **kwargs)
            return self._exit_losses(tuple(exit_layers), *args, **kwargs)

        return forward

    def _exit_losses(
        self,
        exit_layers: tuple[int, ...],
        labels: Tensor,
        exit_weights: Tensor,
        report: bool = False,
        head_sample: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Compute `ExitLosses` as a dict; with ``report``, also each exit's tokens and the targets.

        In the loss, early exits choose among the ascending tokens ``head_sample``. Norm and head weights are read here,
        inside the model's forward, where a sharded model has them whole.
        """
        states = self.states(exit_layers, **kwargs)
        rows, targets = target_rows(labels)
        hiddens = self.loss.gather(states, rows)
        if list(exit_layers) != sorted(set(exit_layers)):
            raise ValueError(f"the exit layers of a loss must ascend, got {list(exit_layers)}")
        early = sum(layer < len(self.layers) for layer in exit_layers)
        out = self.loss.on_rows(hiddens, targets, exit_weights, head_sample, early)._asdict()
        if report:
            out["tokens"] = self.loss.choices(hiddens[:, :REPORTED_ROWS])
            out["targets"] = targets[:REPORTED_ROWS]
        return out

    def states(self, exit_layers: tuple[int, ...], **inputs: Any) -> list[Tensor]:
        """States [B, S, D] after each exit layer, before the final norm; layers above the deepest do not run."""
        unknown = [layer for layer in exit_layers if not 1 <= layer <= len(self.layers)]
        if unknown:
            raise ValueError(f"exit layer {unknown[0]} is not within 1…{len(self.layers)}")
        self._wanted = frozenset(exit_layers)
        try:
            self.model.get_decoder()(**inputs, use_cache=False)
            return [self._states[layer] for layer in exit_layers]
        finally:
            self._wanted, self._states = frozenset(), {}


def _decoder_parts(model: Any) -> tuple[Any, Any]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    if layers is None or _eps(norm) is None:
        raise ValueError(f"{type(model).__name__} has no decoder with layers and a final RMS norm")
    return layers, norm


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))  # Gemma has eps


def convert(model: Any, dropout: LayerDropout | None = None) -> Conversion:
    """Make a causal LM, or one inside a PEFT wrapper, accept ``exit_layers`` and ``exit_weights``.

    ``model(input_ids=…, labels=…, exit_layers=(3, 30), exit_weights=…)`` then returns a dict with ``loss``,
    ``exit_losses`` and ``num_labels``, and runs no layer above the deepest exit; in training mode, ``dropout`` decides
    which samples run which layers. Calls without ``exit_layers`` do not change.

    Raises
    ------
    ValueError
        If the model is converted already, or dropout is for another number of layers.
    UnsupportedModelError
        If the architecture is not one that `layerskip.models` supports.
    """
    base = _base(model)
    if _KEY in base.__dict__:
        raise ValueError("the model is already converted; revert it first")
    check_config(base.config)
    conversion = Conversion(base, dropout)
    base.__dict__[_KEY] = conversion
    return conversion


def revert(model: Any) -> None:
    """Undo `convert`; no-op for a model that is not converted."""
    conversion = _base(model).__dict__.pop(_KEY, None)
    if conversion is not None:
        conversion.undo()
