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
        L, B, G, T and C.
    dtype : torch.dtype
    device : torch.device or str

    Attributes
    ----------
    k, v : Tensor [L, B, G, T, C]
    seq_lens : Tensor [B], int64
        The valid positions of each sequence. Layers read it; their caller advances it.

    Raises
    ------
    ValueError
        If a size is not positive.
    MemoryError
        If there is not enough memory; the message has the size.
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
        sizes = {
            "num_layers": num_layers,
            "batch_size": batch_size,
            "num_kv_heads": num_kv_heads,
            "capacity": capacity,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        shape = (num_layers, batch_size, num_kv_heads, capacity, head_dim)
        self.k, self.v = (_untouched(shape, dtype, device) for _ in range(2))
        self.seq_lens = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def num_layers(self) -> int:
        return self.k.shape[0]

    @property
    def batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """T, the most positions of a sequence."""
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


def _untouched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Allocate an uninitialized tensor, or raise MemoryError."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:  # of torch's allocators; on a card it is OutOfMemoryError, which is one
        size = f"{2 * math.prod(shape) * dtype.itemsize / 1e9:.1f} GB"
        _, batch, _, capacity, _ = shape
        raise MemoryError(
            f"keys and values of {batch} sequences of {capacity} positions take {size}, which {device} does not have; "
            f"give a smaller max_seq_len or fewer sequences ({error})"
        ) from error
