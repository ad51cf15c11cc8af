"""Rounds that are recorded and replayed: the same tokens, fixed addresses, nothing looked at on the host.

There is no GPU here, so `FakeGPU` stands in for it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from exits_of import copied_exit, random_exit
from gpus import FakeGPU, InOrder, graphs_on
from tiny import ROUND, prompt_of, requires_native, tiny_model
from torch import Tensor

import layerskip_kernels
from layerskip import DraftSource, SamplingParams, SelfSpeculativeDecoder, models
from layerskip.decoding import cuda_graphs
from layerskip.decoding.cuda_graphs import Graphs
from layerskip.decoding.session import Session
from layerskip.decoding.spec_step import LookupDrafts, SequenceTensors, SpecStep

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens_of(decoder: SelfSpeculativeDecoder, slots: int, gpu: FakeGPU | Graphs | None, **kwargs) -> list[list[int]]:
    """What three requests of unequal length give, two of them at first, in a cache of ``slots``."""
    graphs = graphs_on(gpu) if isinstance(gpu, FakeGPU) else gpu
    with InOrder(gpu) if isinstance(gpu, FakeGPU) else nullcontext():
        return _tokens_of(decoder, slots, graphs, **kwargs)


def _tokens_of(decoder: SelfSpeculativeDecoder, slots: int, graphs: Graphs | None, **kwargs) -> list[list[int]]:
    with torch.inference_mode(False):
        cache = decoder.model.decoder.new_cache(slots, 64)
    session = Session(decoder.model, cache, decoder.defaults, decoder.controller, 48, 5, graphs=graphs)
    sampling = kwargs.pop("sampling", [None] * 3)
    limits, prompts = (9, 20, 13), [prompt_of(length, seed) for seed, length in enumerate((5, 9, 3))]
    emitted: dict[int, list[int]] = {}

    def add(index: int) -> None:
        emitted[session.add(prompts[index], limits[index], sampling=sampling[index], eos_token_id=[], **kwargs)] = []

    def step() -> None:
        for update in session.step():
            assert update.error is None
            emitted[update.request_id] += update.tokens

    add(0)
    add(1)
    step()
    add(2)
    while len(session):
        step()
    return list(emitted.values())


SAMPLING = {"greedy": [None] * 3, "drawn": [SamplingParams(temperature=0.7 * row, seed=row) for row in range(3)]}


@requires_native
@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("strategy", ["self_speculative", "with draft layers", "autoregressive", "early_exit"])
@pytest.mark.parametrize(("slots", "lazy"), [(2, True), (5, True), (5, False)])
def test_the_same_tokens(slots, lazy, strategy, kind):
    model, exit_ = tiny_model(upper="weak"), None
    if strategy == "with draft layers":
        strategy, exit_ = "self_speculative", copied_exit(models.adapt(model), 1, 2)
    decoder = SelfSpeculativeDecoder(model, exit_layer=1, num_speculations=3, exit=exit_)
    gpu = FakeGPU(lazy)
    given = {"strategy": strategy, "sampling": SAMPLING[kind]}
    assert tokens_of(decoder, slots, gpu, **given) == tokens_of(decoder, slots, None, **given)
    assert gpu.replays > 2 * gpu.captures > 0
    assert gpu.most_unread >= 2 if lazy else gpu.most_unread == 1


@requires_native
@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("source", ["ngram", "auto"])
@pytest.mark.parametrize("slots", [2, 5])
def test_lookup_drafts_give_the_same_tokens(slots, source, kind):
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), exit_layer=1, num_speculations=3)
    gpu = FakeGPU()
    given = {"draft_source": source, "sampling": SAMPLING[kind]}
    if source == "auto":  # what it picks depends on clocks, and so do the draws
        given["sampling"] = SAMPLING["greedy"]
    assert tokens_of(decoder, slots, gpu, **given) == tokens_of(decoder, slots, None, **given)
    assert gpu.captures > 1
    assert gpu.most_unread == 1  # what is looked up depends on what was read


class AnyNumber(DraftSource):
    """One draft to seven, by turns."""

    def propose(self, history):
        return [7] * (1 + len(history) % 7)


@requires_native
@pytest.mark.parametrize("kind", SAMPLING)
def test_lookup_drafts_of_any_number_need_few_recordings(kind):
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), exit_layer=1, num_speculations=3)
    gpu, given = FakeGPU(), {"draft_source": AnyNumber(), "sampling": SAMPLING[kind]}
    assert tokens_of(decoder, 3, gpu, **given) == tokens_of(decoder, 3, None, **given)
    assert gpu.captures <= 3 * 3  # of one, two and three sequences, with 0, 4 and 8 drafts


@requires_native
def test_padding_does_not_overwrite_a_prompt_in_prefill(monkeypatch):
    """Padding writes into free slots, and a slot whose prompt is half read is none."""
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), exit_layer=1, num_speculations=3)
    gpu = FakeGPU()
    monkeypatch.setattr(cuda_graphs, "for_device", lambda device: graphs_on(gpu))
    session = decoder.open_session(4, max_seq_len=64, prompt_tokens_per_step=2)
    monkeypatch.undo()
    prompts = [prompt_of(length, length) for length in (5, 6, 7, 12)]
    emitted: dict[int, list[int]] = {}

    def step() -> None:
        with InOrder(gpu):
            for update in session.step():
                emitted[update.request_id] += update.tokens

    for prompt in prompts:
        emitted[session.add(prompt, 40 if len(prompt[0]) < 12 else 20, eos_token_id=[])] = []
        while len(prompt[0]) < 12 and len(session._scheduler.running) < len(emitted):
            step()
    for _ in range(60):
        step()
    assert len(session) == 0
    for prompt, tokens in zip(prompts, emitted.values(), strict=True):
        plain = decoder.generate(prompt, len(tokens), strategy="autoregressive", eos_token_id=[])
        assert tokens == plain.new_tokens[0].tolist()


@requires_native
def test_every_round_of_a_graph_has_the_same_addresses(monkeypatch):
    decoder = SelfSpeculativeDecoder(tiny_model(), exit_layer=1, num_speculations=3)
    seen: dict[int, set] = {}

    def watched(*args, **named):
        tensors = (args[0], args[1], *args[2], *args[3], *args[5])
        addresses = tuple(one.data_ptr() for one in tensors if one is not None)
        seen.setdefault(len(args[0]), set()).add(addresses)
        return layerskip_kernels.speculative_round(*args, **named)

    monkeypatch.setattr(ROUND, watched)
    gpu = FakeGPU()
    tokens_of(decoder, 5, gpu)
    assert gpu.replays > 6
    assert sorted(seen) == [1, 2, 4]  # three requests are padded to four
    assert all(len(addresses) == 1 for addresses in seen.values())


def sequences_of(count: int, temperature: float = 0.0) -> SequenceTensors:
    temperatures = [temperature] * count
    return SequenceTensors.of([7] * count, [3] * count, range(count), [1] * count, temperatures, torch.device("cpu"))


def counted(sequences: SequenceTensors) -> Tensor:
    """A round that only moves on."""
    sequences.token.add_(1)
    sequences.seq_lens.add_(2)
    return torch.stack([sequences.token, sequences.seq_lens], 1)


def test_sequences_stay_in_the_graph_and_padding_is_reset():
    graphs, sequences = graphs_on(FakeGPU()), sequences_of(4)
    for turn in (1, 2, 3):
        outcome, sequences = graphs.launch("kind", counted, sequences, 3)
        assert outcome.read()[:3] == [[7 + turn, 3 + 2 * turn]] * 3
        assert sequences.token.tolist() == [7 + turn] * 3 + [0]
        assert sequences.seq_lens.tolist() == [3 + 2 * turn] * 3 + [0]
    outcome, others = graphs.launch("kind", counted, sequences_of(4), 4)
    assert outcome.read() == [[8, 5]] * 4
    assert others is sequences
    assert others.token.tolist() == [8] * 4
    assert len(graphs) == 1


def test_a_round_is_read_after_the_next_one_was_launched():
    gpu = FakeGPU()
    graphs, sequences, outcomes = graphs_on(gpu), sequences_of(1), []
    for _ in range(2):
        outcome, sequences = graphs.launch("kind", counted, sequences, 1)
        outcomes.append(outcome)
    assert outcomes[0]._host.tolist() == [[-99, -99]]  # it is not there before it was waited for
    assert outcomes[0].read() == [[8, 5]]
    assert outcomes[1]._host.tolist() == [[-99, -99]]
    outcome, _ = graphs.launch("kind", counted, sequences, 1)
    assert outcomes[1].read() == [[9, 7]]
    assert outcomes[1].seconds == 1.0
    assert outcome.read() == [[10, 9]]


def test_another_stream_waits_for_the_last_round():
    gpu = FakeGPU()
    graphs = graphs_on(gpu)
    graphs.follow()
    outcome, _ = graphs.launch("kind", counted, sequences_of(1), 1)
    graphs.follow()
    assert outcome.end.waits == []
    gpu.current = "another stream"
    graphs.follow()
    graphs.follow()
    assert outcome.end.waits == ["another stream"]
    graphs.finish()
    assert outcome._host.tolist() == [[8, 5]]


@pytest.mark.parametrize("way", ["dropped", "of other weights", "too many"])
def test_freeing_memory_waits_for_the_round_that_uses_it(way):
    graphs, weight = Graphs(FakeGPU(), max_graphs=1), torch.ones(3)
    graphs.hold([weight])
    outcome, _ = graphs.launch("kind", counted, sequences_of(1), 1)
    assert outcome._host.tolist() == [[-99, -99]]
    if way == "dropped":
        del graphs
    elif way == "of other weights":
        graphs.hold([torch.ones(3)])
    else:
        graphs.launch("another kind", counted, sequences_of(1), 1)
    assert outcome._host.tolist() == [[8, 5]]


class Forgetful(FakeGPU):
    """Holds nothing of what it recorded, as a GPU, which knows addresses alone; a round gives the same every time."""

    def capture(self, function):
        return function().clone(), lambda: self.put(lambda: None)


@requires_native
def test_a_session_may_be_dropped_with_a_round_in_flight(monkeypatch):
    gpu = Forgetful()
    monkeypatch.setattr(cuda_graphs, "for_device", lambda device: graphs_on(gpu))
    session = SelfSpeculativeDecoder(tiny_model(), exit_layer=1, num_speculations=3).open_session(1, max_seq_len=48)
    session.add(prompt_of(5), 40, eos_token_id=[])
    for _ in range(2):  # the prompt, then a round and one ahead of it
        session.step()
    held = {tensor.data_ptr() for tensor in session._graphs._fixed}
    assert {session._cache.k.data_ptr(), session._cache.v.data_ptr()} <= held
    assert gpu._queue
    del session
    assert not gpu._queue


def test_graphs_are_kept_by_kind_and_size_up_to_a_number():
    gpu = FakeGPU()
    graphs = Graphs(gpu, max_graphs=2)

    def recorded(kind: str, count: int, temperature: float = 0.0) -> bool:
        before = gpu.captures
        graphs.launch(kind, counted, sequences_of(count, temperature), count)
        return gpu.captures > before

    assert [recorded("a", 1), recorded("a", 1), recorded("b", 1), recorded("a", 1)] == [True, False, True, False]
    assert recorded("a", 2)  # in the place of b, which was not used for longest
    assert not recorded("a", 1)
    assert recorded("b", 1)
    assert recorded("a", 1, temperature=0.5)
    assert len(graphs) == 2


def test_moved_weights_drop_the_graphs():
    gpu, sequences = FakeGPU(), sequences_of(1)
    graphs, weight = graphs_on(gpu), torch.nn.Parameter(torch.ones(3))

    def launch() -> None:
        graphs.hold([weight])
        graphs.launch("kind", counted, sequences, 1)

    launch()
    with torch.no_grad():
        weight.add_(1)
    launch()
    assert gpu.captures == 1
    weight.data = torch.zeros(3)
    launch()
    assert gpu.captures == 2
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("count", "free", "missing"), [(1, 9, 0), (2, 9, 0), (3, 9, 1), (5, 3, 3), (5, 2, 0), (8, 0, 0)]
)
def test_padding_takes_slots_that_are_free(count, free, missing):
    assert Graphs.padding(count, free) == missing


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda sequences: sequences.token * int(sequences.token[0]), "looks at a value"),
        (lambda sequences: sequences.token[sequences.token > 0], "looks at a mask"),
        (lambda sequences: sequences.token.nonzero(), "a shape that depends on values"),
        (lambda sequences: sequences.token + torch.tensor([1]), "copies from the host"),
    ],
)
def test_host_synchronization_is_detected(wrong, message):
    graphs = graphs_on(FakeGPU())
    outcome, _ = graphs.launch("kind", lambda one: wrong(one).view(-1, 1), sequences_of(1), 1)
    with pytest.raises(AssertionError, match=message):
        outcome.read()


@pytest.mark.parametrize("num_draft_layers", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_round_never_reads_values_on_the_host(temperature, num_draft_layers):
    """On the device "meta" there are none, and no branch for the CPU is taken."""
    model = models.adapt(tiny_model())
    model = model.with_exit(random_exit(model, 1, num_draft_layers).of(model)).to("meta")
    with torch.inference_mode():
        cache = model.decoder.new_cache(4, 64)
        sequences = SequenceTensors.of([0, 0], [5, 9], [3, 1], [1, 2], [temperature] * 2, torch.device("meta"))
        step = SpecStep(model, cache)
        assert step.speculate(sequences, 1, 3, 0.0 if temperature else 0.25).shape == (2, 5)
        assert step.advance(sequences, model.num_layers).shape == (2, 2)
        lookup = LookupDrafts.of([[1, 2, 3], [4]], 3, model.vocab_size, torch.device("meta"), sequences.draws)
        assert step.speculate(replace(sequences, lookup=lookup), 1, 3).shape == (2, 5)


def test_without_a_gpu_rounds_are_called(monkeypatch):
    assert cuda_graphs.for_device(torch.device("cpu")) is None
    assert isinstance(cuda_graphs.for_device(torch.device("cuda")), Graphs)
    monkeypatch.setenv("LAYERSKIP_GRAPHS", "0")
    assert cuda_graphs.for_device(torch.device("cuda")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive"])
def test_cuda_graphs_give_the_same_tokens(strategy, kind):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak").to("cuda"), exit_layer=1, num_speculations=3)
    graphs = cuda_graphs.for_device(decoder.model.device)
    given = {"strategy": strategy, "sampling": SAMPLING[kind]}
    assert tokens_of(decoder, 5, graphs, **given) == tokens_of(decoder, 5, None, **given)
    assert graphs is not None
    assert len(graphs) > 0
