"""The one key/value cache that drafting and verification share."""

from __future__ import annotations

import math

import torch


class SharedKVCache:
    """Keys and values of all layers, and the length of each sequence.

    Nothing at or beyond a sequence's length is read before it is written again. So a rollback only sets a length, early
    layers may hold more positions than later ones within a round, and a new cache is not filled.

    Parameters
    ----------
    num_layers, batch_size, num_kv_heads, capacity, head_dim : int
        L, B, G, T and C, each at least 1: ``k`` and ``v`` are [L, B, G, T, C]. ``seq_lens`` [B], int64, are the
        numbers of valid positions; layers read them, their caller advances them.
    dtype : torch.dtype
    device : torch.device or str

    Raises
    ------
    ValueError, MemoryError
        For a size below 1, or without enough memory; the message has the size.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch_size, num_kv_heads, capacity, head_dim)
        names = ("num_layers", "batch_size", "num_kv_heads", "capacity", "head_dim")
        for name, size in zip(names, shape, strict=True):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        try:
            self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        except RuntimeError as error:  # of torch's allocators, OutOfMemoryError among them
            raise MemoryError(
                f"keys and values of {batch_size} sequences of {capacity} positions take "
                f"{2 * math.prod(shape) * dtype.itemsize / 1e9:.1f} GB, which {device} does not have; give a smaller "
                f"max_seq_len or fewer sequences ({error})"
            ) from error
        self.seq_lens = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def num_layers(self) -> int:
        return self.k.shape[0]

    @property
    def batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """T, the number of positions that a sequence may have."""
        return self.k.shape[3]

    def slot(self, index: int) -> SharedKVCache:
        """A view of row ``index``, which holds one sequence; ValueError if it is not in 0 … B - 1."""
        if not 0 <= index < self.batch_size:
            raise ValueError(f"slot must be in 0 … {self.batch_size - 1}, got {index}")
        view = object.__new__(SharedKVCache)
        part = slice(index, index + 1)
        view.k, view.v, view.seq_lens = self.k[:, part], self.v[:, part], self.seq_lens[part]
        return view

    def reset(self) -> None:
        self.seq_lens.zero_()

    def copy_prefix(self, source: int, target: int, length: int, num_layers: int) -> None:
        """Copy the first ``length`` positions of one row to another, in layers [0, num_layers)."""
        for half in (self.k, self.v):
            half[:num_layers, target, :, :length] = half[:num_layers, source, :, :length]
