"""The one key/value cache that drafting and verification share."""

from __future__ import annotations

import torch
from torch import Tensor


class SharedKVCache:
    """Keys and values of all layers, and one length a sequence.

    What lies at or beyond a sequence's length is never read before it is written again, so going back is a write of a
    length, and shallow layers may run ahead of deep ones within a round.

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
        How many positions of each sequence are valid. Steps read it; whoever decodes advances it.

    Raises
    ------
    ValueError
        If a size is not positive.
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
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.seq_lens = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.k.shape[0]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """T, the most positions that a sequence may have."""
        return self.k.shape[3]

    def slot(self, index: int) -> SharedKVCache:
        """The cache of one sequence, as a view: what is written to it is written here.

        Parameters
        ----------
        index : int
            In 0 … B - 1.

        Raises
        ------
        ValueError
            If it is not.
        """
        if not 0 <= index < self.batch_size:
            raise ValueError(f"slot must be in 0 … {self.batch_size - 1}, got {index}")
        view = object.__new__(SharedKVCache)
        part = slice(index, index + 1)
        view.k, view.v, view.seq_lens = self.k[:, part], self.v[:, part], self.seq_lens[part]
        return view

    def reset(self) -> None:
        """Forget every sequence."""
        self.seq_lens.zero_()

    def rollback(self, lengths: Tensor | int) -> None:
        """Set the lengths; nothing is copied or cleared.

        Parameters
        ----------
        lengths : Tensor [B], int64, or int
            The positions of each sequence that stay valid.

        Raises
        ------
        ValueError
            If the shape is another, or a length is outside [0, capacity]. On a GPU the values of a tensor are not
            looked at, since that would synchronise with it.
        TypeError
            If ``lengths`` is a tensor of another dtype than int64.
        """
        if isinstance(lengths, int):
            lengths = torch.full((self.batch_size,), lengths, dtype=torch.int64)
        if lengths.dtype != torch.int64:
            raise TypeError(f"lengths has dtype {str(lengths.dtype).removeprefix('torch.')}, expected int64")
        if lengths.shape != self.seq_lens.shape:
            raise ValueError(f"lengths has shape {list(lengths.shape)}, expected [{self.batch_size}]")
        if lengths.device.type == "cpu":
            for sequence, length in enumerate(lengths.tolist()):
                if not 0 <= length <= self.capacity:
                    raise ValueError(f"length {length} of sequence {sequence} is outside [0, {self.capacity}]")
        self.seq_lens.copy_(lengths)
