"""The processes of a run that torchrun has started: which one this is, and what they tell each other.

One process alone is a run, too; then all of this costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Item = TypeVar("Item")


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which one this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Whether this is the one that prints and writes."""
    return rank() == 0


def check_device(name: str) -> None:
    """Raise ValueError where ``--device`` names one card for several processes."""
    if ":" in name and count() > 1:
        raise ValueError(f"--device {name} is one card, under torchrun every process has its own; leave it out")


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Be one of the processes; what is given is this one's device, of the kind of ``device``."""
    if count() == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()  # without it gloo may abort at exit


def share(items: Sequence[T]) -> Sequence[T]:
    """What of it is this process's to do."""
    return items[rank() :: count()]


def wait() -> None:
    """Return when all have come here."""
    if count() > 1:
        dist.barrier()


def all_of(made: T) -> list[T]:
    """What each process has made, for all of them; it travels pickled."""
    if count() == 1:
        return [made]
    every: list[T] = [made] * count()
    dist.all_gather_object(every, made)
    return every


def of_first(value: T) -> T:
    """The first process's value, for all of them."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def add(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over the processes."""
    if count() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def in_turns(work: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
    """``work`` of every item, in their order, for the first process; each does one of every `count` items."""
    left = iter(items)
    while turn := list(islice(left, count())):
        made = [work(item) for item in share(turn)]
        for part in to_first(made):
            yield from part


def to_first(made: T) -> list[T]:
    """What each process has made, for the first; for the others nothing."""
    if count() == 1:
        return [made]
    every: list[T] | None = [made] * count() if first() else None
    dist.gather_object(made, every)
    return every or []
