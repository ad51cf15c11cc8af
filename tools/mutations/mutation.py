"""What a planted bug is."""

from __future__ import annotations

from typing import NamedTuple

KERNELS, LAYERSKIP, VLLM = "tests/kernels/", "tests/layerskip/", "tests/vllm/"


class Mutation(NamedTuple):
    """One planted bug; ``tests`` is what pytest gets."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def compiled(self) -> bool:
        """Whether the library must be built again; the tests of thread_pool.h and of the CUDA kernels compile them."""
        return self.file.startswith("csrc/cpu") and not self.file.endswith("thread_pool.h")
