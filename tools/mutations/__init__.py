"""The bugs that `tools.mutate` plants, each with the tests that are to catch it.

Each was made once, or is one that a rewrite could make. ``old`` stands in ``file`` once.
"""

from . import cpu, cuda, interfaces, models, ops, rounds, training, triton, vllm
from .mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

_AREAS = (ops, cpu, cuda, triton, rounds, models, training, interfaces, vllm)
MUTATIONS = [bug for area in _AREAS for bug in area.BUGS]
