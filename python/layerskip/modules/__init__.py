"""The parts of an early-exit model: any range of layers, the exit head, the one shared cache."""

from layerskip_kernels import LayerWeights

from .cache import SharedKVCache
from .decoder import PartialDepthDecoder
from .head import EarlyExitHead

__all__ = ["EarlyExitHead", "LayerWeights", "PartialDepthDecoder", "SharedKVCache"]
