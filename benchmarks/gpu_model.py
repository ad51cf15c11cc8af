"""A model of random weights: what `benchmarks.gpu` runs, op by op and as a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip.models import EarlyExitHead, LayerSkipModel, PartialDepthDecoder
from layerskip_kernels import LayerWeights
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, layer_shapes

EPS = 1e-5
CACHE_CAPACITY, CACHE_LENGTH = 1024, 512
PER_LAYER = len(REQUIRED_WEIGHTS)  # tensors of a layer


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and where it exits."""

    name: str
    layers: int
    hidden: int
    features: int
    heads: int
    groups: int
    size: int
    vocabulary: int
    exit_layer: int
    draft: int


LLAMA_1B = Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, 4, 6)
LLAMA_8B = Shape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256, 8, 6)


class Model:
    """Random weights of a shape, and a cache of one sequence."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        shapes = layer_shapes(shape.hidden, shape.heads, shape.groups, shape.size, shape.features)
        self.weights = [self.random(*shapes[name]) for _ in range(shape.layers) for name in REQUIRED_WEIGHTS]
        self.norm, self.head = self.random(shape.hidden), self.random(shape.vocabulary, shape.hidden)
        cache = (shape.layers, 1, shape.groups, CACHE_CAPACITY, shape.size)
        self.keys, self.values = self.random(*cache), self.random(*cache)
        self.frequencies = 10000.0 ** (-torch.arange(0, shape.size, 2) / shape.size)
        angle = torch.outer(torch.arange(CACHE_CAPACITY), self.frequencies).float()
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)
        self.lengths = torch.full((1,), CACHE_LENGTH, dtype=torch.int64, device=device)

    def random(self, *size: int) -> Tensor:
        """Normal entries of a weight's usual size."""
        return torch.randn(size, device=self.device, dtype=self.dtype) * size[-1] ** -0.5

    def noise(self, rows: int = 1) -> lk.Noise:
        """A temperature of 0.8 and a seed for each row."""
        seed = torch.arange(rows, device=self.device)
        return lk.Noise(torch.full((rows,), 0.8, device=self.device), seed)

    @property
    def cache(self) -> lk.KVCache:
        """Keys and values with the lengths, which no call advances."""
        return lk.KVCache(self.keys, self.values, self.cos, self.sin, self.lengths)

    def forward(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """Layers [start, end), as `layerskip_kernels.partial_forward`."""
        weights = self.weights[start * PER_LAYER : end * PER_LAYER]
        return lk.partial_forward(hidden, weights, self.cache, start, end, EPS)

    def step(self, token: Tensor, noise: lk.Noise | None = None) -> Tensor:
        """One token through all layers, greedily or drawn; the length stays, so that every replay does the same."""
        given = (self.weights, self.cache, self.shape.layers, lk.Head(self.norm, self.head), 1)
        return lk.draft(token, self.head, *given, extend=False, eps=EPS, noise=noise).tokens[:, 0]

    def round(self, token: Tensor, noise: lk.Noise | None = None) -> lk.Round:
        """A round of self-speculative decoding; the length stays, and acceptance is timed, not counted."""
        shape, cache = self.shape, self.cache._replace(seq_lens=self.lengths.clone())
        given = (self.weights, cache, shape.exit_layer, lk.Head(self.norm, self.head), shape.draft)
        return lk.speculative_round(token, self.head, *given, eps=EPS, noise=noise)

    def layer_bytes(self, start: int, end: int) -> int:
        """What layers [start, end) must read at least."""
        weights = self.weights[start * PER_LAYER : end * PER_LAYER]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def decoder_model(self) -> LayerSkipModel:
        """The same weights as a model that `layerskip.SelfSpeculativeDecoder` takes."""
        shape = self.shape
        layers = [LayerWeights(*self.weights[at : at + PER_LAYER]) for at in range(0, len(self.weights), PER_LAYER)]
        decoder = PartialDepthDecoder(layers, shape.groups, EPS, self.frequencies.float())
        config = SimpleNamespace(max_position_embeddings=CACHE_CAPACITY)
        return LayerSkipModel(self.head, decoder, EarlyExitHead(self.norm, self.head, EPS), config)
