"""A round has one place where the host waits for a GPU, wherever its drafts come from.

There is no GPU here: the CPU is taken for one by the name "cuda", and what would wait there is counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exits_of import copied_exit
from gpus import FakeEvent, FakeGPU, graphs_on
from tiny import prompt_of, requires_native, tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

from layerskip import DraftSource, SamplingParams, SelfSpeculativeDecoder, models
from layerskip.decoding.session import Session
from layerskip.devices import to_device
from layerskip.models import LayerSkipModel

pytestmark = pytest.mark.usefixtures("one_thread")

READS = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.__int__, Tensor.__bool__,
         Tensor.__float__, Tensor.__index__, torch.nonzero, torch.equal, torch.allclose, Tensor.new_tensor}  # fmt: skip


def on_gpu(value: Any) -> bool:
    return value is not None and not isinstance(value, Tensor) and str(value).startswith("cuda")


class Waits(TorchFunctionMode):
    """Counts what would wait for the GPU, but for what the GPU itself does."""

    def __init__(self, gpu: FakeGPU | None = None) -> None:
        super().__init__()
        self._gpu, self._pinned = gpu, set[int]()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._gpu is not None and self._gpu.busy:
            return func(*args, **kwargs)
        if func is Tensor.pin_memory:
            self._pinned.add(args[0].data_ptr())
            return args[0]
        if func in READS or (func is torch.tensor and on_gpu(kwargs.get("device"))):
            self.seen.append(func.__name__)
        copies = func is Tensor.to and any(map(on_gpu, (*args, *kwargs.values())))
        if copies and not (kwargs.get("non_blocking") and args[0].data_ptr() in self._pinned):
            self.seen.append("to")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and looks(args[1]):
            self.seen.append(func.__name__)
        args = [torch.device("cpu") if on_gpu(one) else one for one in args]
        return func(*args, **{name: "cpu" if on_gpu(one) else one for name, one in kwargs.items()})


def looks(index: Any) -> bool:
    """Whether an index comes from the host, or has a shape that depends on values."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(one, list) or (isinstance(one, Tensor) and one.dtype == torch.bool) for one in parts)


@pytest.mark.parametrize(
    ("work", "seen"),
    [
        (lambda: torch.tensor([1], device="cuda"), ["tensor"]),
        (lambda: torch.tensor([1]).to("cuda", non_blocking=True), ["to"]),
        (lambda: torch.tensor([1]).pin_memory().to("cuda"), ["to"]),
        (lambda: torch.ones(2)[[0, 1]], ["__getitem__"]),
        (lambda: int(torch.ones(1)) + torch.ones(1).item(), ["__int__", "item"]),
        (lambda: to_device(torch.tensor([1]), torch.device("cuda")), []),
    ],
)
def test_what_waits_is_seen(work, seen):
    with Waits() as waits:
        work()
    assert waits.seen == seen


SAMPLING = {
    "greedy": SamplingParams(),
    "drawn": SamplingParams(temperature=0.8, seed=3),
    "processed": SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2, logit_bias={3: 1.0}, seed=3),
}


@requires_native
@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("sources", [("ngram", "ngram"), ("exit", "exit"), ("exit", "ngram"), ("auto", "auto")])
def test_a_round_waits_once(monkeypatch, sources, kind):
    """With lookup drafts, with drafts of an exit with draft layers, with both, and whatever the clock favours."""
    model, hf_model = models.adapt(tiny_model(upper="weak")), tiny_model(upper="weak")
    decoder, gpu = SelfSpeculativeDecoder(hf_model, 1, 3, exit=copied_exit(model, 1, 1)), FakeGPU()
    cache = decoder.model.decoder.new_cache(2, 128)
    session = Session(decoder.model, cache, decoder.defaults, decoder.controller, 96, 12, graphs=graphs_on(gpu))
    for row, source in enumerate(sources):
        prompt = prompt_of(6, row).repeat(1, 3)
        session.add(prompt, 60, draft_source=source, sampling=SAMPLING[kind], eos_token_id=[])
    session.step()
    waits, reached = Waits(gpu), FakeEvent.synchronize

    def synchronize(event: FakeEvent) -> None:
        if event.gpu is gpu:  # not one of another test, whose graphs are collected now
            waits.seen.append("event")
        reached(event)

    monkeypatch.setattr(FakeEvent, "synchronize", synchronize)
    monkeypatch.setattr(LayerSkipModel, "device", torch.device("cuda"))
    rounds = 0
    while True:
        waits.seen.clear()
        with waits:
            session.step()
        if len(session._scheduler.running) < 2:
            break
        assert len(waits.seen) == 1, waits.seen
        rounds += 1
    assert rounds > 5


class Four(DraftSource):
    """As many drafts in every round, so that one recorded round serves."""

    def propose(self, history):
        return [1, 2, 3, 4]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["greedy", "drawn"])
def test_a_gpu_is_not_waited_for_but_by_the_event(kind):
    """torch raises where an op waits for the GPU; the event is not one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak").to("cuda"), 1, 3, draft_source=Four())
    session = decoder.open_session(1, max_seq_len=96)
    session.add(prompt_of(6), 60, sampling=SAMPLING[kind], eos_token_id=[])
    for _ in range(4):  # by then the round is recorded
        session.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
