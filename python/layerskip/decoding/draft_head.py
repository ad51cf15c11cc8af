"""The part of the vocabulary that drafts are chosen from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import registry
from .._extras import need
from .._files import write_atomically
from ..models import EarlyExitHead, LayerSkipModel
from . import validation

FILE_NAME = "draft_head.safetensors"


class DraftHead:
    """The tokens worth drafting. Drafts are chosen with their rows of the model's head, in int8.

    Other tokens are never drafted, but verification with the full head still emits them, so the result is the same.
    Only the choice of tokens is kept and saved; the rows are taken from the model that it is used with.

    Parameters
    ----------
    token_ids : Tensor [S] or sequence of int
        In any order, repeated or not.
    vocab_size : int
        V of the model.

    Raises
    ------
    ValueError
        If there is no token, or one is outside the vocabulary.
    """

    def __init__(self, token_ids: Tensor | Sequence[int], vocab_size: int) -> None:
        self.token_ids = torch.as_tensor(token_ids, dtype=torch.int64).unique()  # sorted
        self.vocab_size = vocab_size
        if self.token_ids.numel() == 0:
            raise ValueError("a draft head needs at least one token")
        first, last = int(self.token_ids[0]), int(self.token_ids[-1])
        if first < 0 or last >= vocab_size:
            raise ValueError(f"token id {first if first < 0 else last} is outside the vocabulary of {vocab_size}")

    @classmethod
    def from_tokens(
        cls, texts: Iterable[Sequence[int]], vocab_size: int, eos_token_id: int | Sequence[int], size: int = 8192
    ) -> DraftHead:
        """The ``size`` most frequent tokens of tokenized texts, and always those that end a sequence.

        If the texts have fewer different tokens, the lowest ids are added: byte-pair vocabularies list frequent tokens
        first.

        Raises
        ------
        ValueError
            If ``size`` does not fit the vocabulary, or a token is outside it.
        """
        if not 1 <= size <= vocab_size:
            raise ValueError(f"size must be in 1 … {vocab_size}, the vocabulary, got {size}")
        stops = validation.stop_tokens(eos_token_id, vocab_size)
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for text in texts:
            tokens = torch.as_tensor(text, dtype=torch.int64)
            outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
            if outside.numel():
                raise ValueError(f"token id {int(outside[0])} is outside the vocabulary of {vocab_size}")
            counts += tokens.bincount(minlength=vocab_size)
        counts[sorted(stops)] = torch.iinfo(torch.int64).max
        return cls(counts.sort(descending=True, stable=True).indices[:size], vocab_size)

    def of(self, model: LayerSkipModel) -> EarlyExitHead:
        """The rows of ``model``'s head for these tokens, in int8 with one scale a row."""
        return model.head.quantize(self.rows(model))

    def rows(self, model: LayerSkipModel) -> Tensor:
        """The rows of a model's head that it takes, on the model's device; ValueError for another vocabulary."""
        if model.vocab_size != self.vocab_size:
            raise ValueError(
                f"the draft head is for a vocabulary of {self.vocab_size}, the model has {model.vocab_size}"
            )
        return self.token_ids.to(model.device)

    def save(self, path: str | Path) -> Path:
        """Write a file, or ``draft_head.safetensors`` in a directory; whole or not at all."""
        target = _file(path)
        data = need("safetensors.torch", "saving a draft head").save(
            {"token_ids": self.token_ids.cpu()}, metadata={"vocab_size": str(self.vocab_size)}
        )
        write_atomically(target, data)
        return target

    @classmethod
    def load(cls, source: str | Path) -> DraftHead:
        """Read what `save` wrote, from a file or a directory, or what a model that a package provides comes with.

        Parameters
        ----------
        source : str or Path
            A path, or the model's name (`layerskip.registry`).

        Raises
        ------
        FileNotFoundError, ModuleNotFoundError, ValueError
            If there is none, or it is not a draft head.
        """
        safetensors = need("safetensors", "reading a draft head")
        named = isinstance(source, str) and "/" not in source
        path = registry.draft_head(str(source)) if named else None
        path = path or _file(source)
        if not path.exists():
            hint = f"; {registry.hint(registry.MODELS, str(source))}" if named else ""
            raise FileNotFoundError(f"no draft head at {path}{hint}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                vocab_size = (file.metadata() or {})["vocab_size"]
                return cls(file.get_tensor("token_ids"), int(vocab_size))
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a draft head: {error}") from error


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path
