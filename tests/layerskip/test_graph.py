"""Rounds that are recorded and replayed: the same tokens, fixed addresses, nothing looked at on the host.

There is no card here, so what records is a stand-in that calls the recorded function again, on the tensors that it was
recorded with; everything around it is what runs on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from exits_of import copied_exit, random_exit
from tiny import ROUND, prompt_of, requires_native, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import layerskip_kernels
from layerskip import SamplingParams, SelfSpeculativeDecoder, models
from layerskip.decoding import graph
from layerskip.decoding.graph import Graphs
from layerskip.decoding.round import FusedRound, LookedUp, SequenceTensors
from layerskip.decoding.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")


class NoLook(TorchDispatchMode):
    """Fails where a value goes to the host, which in a capture is an error and in a round would be a wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a round looks at a value"
        return func(*args, **(kwargs or {}))


class Recorder:
    """Stands in for `CudaCapture`."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], object]]:
        result = function().clone()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            with NoLook():
                result.copy_(function())

        return result, replay


def tokens_of(decoder: SelfSpeculativeDecoder, slots: int, graphs: Graphs | None, **kwargs) -> list[list[int]]:
    """What three requests of unequal length give, two of them at first, in a cache of ``slots``."""
    with torch.inference_mode(False):
        cache = decoder.model.decoder.new_cache(slots, 64)
    session = Session(decoder.model, cache, decoder.defaults, 48, 5, graphs=graphs)
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
@pytest.mark.parametrize("strategy", ["self_speculative", "with blocks", "autoregressive", "early_exit"])
@pytest.mark.parametrize("slots", [2, 5])
def test_the_same_tokens(slots, strategy, kind):
    model, exit_ = tiny_model(upper="weak"), None
    if strategy == "with blocks":
        strategy, exit_ = "self_speculative", copied_exit(models.adapt(model), 1, 2)
    decoder = SelfSpeculativeDecoder(model, exit_layer=1, num_speculations=3, exit=exit_)
    recorder = Recorder()
    graphs = Graphs(recorder)
    given = {"strategy": strategy, "sampling": SAMPLING[kind]}
    assert tokens_of(decoder, slots, graphs, **given) == tokens_of(decoder, slots, None, **given)
    assert recorder.captures == len(graphs)
    assert recorder.replays > 2 * recorder.captures


@requires_native
@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("source", ["ngram", "auto"])
@pytest.mark.parametrize("slots", [2, 5])
def test_the_same_tokens_where_drafts_are_looked_up(slots, source, kind):
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), exit_layer=1, num_speculations=3)
    graphs = Graphs(Recorder())
    given = {"draft_source": source, "sampling": SAMPLING[kind]}
    if source == "auto":  # what it picks depends on clocks, and so do the draws
        given["sampling"] = SAMPLING["greedy"]
    assert tokens_of(decoder, slots, graphs, **given) == tokens_of(decoder, slots, None, **given)
    assert len(graphs) > 1


@requires_native
def test_padding_leaves_a_prompt_alone_that_is_being_read(monkeypatch):
    """Padding writes into free slots, and a slot whose prompt is half read is none."""
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), exit_layer=1, num_speculations=3)
    monkeypatch.setattr(graph, "for_device", lambda device: Graphs(Recorder()))
    session = decoder.open_session(4, max_seq_len=64, prompt_tokens_per_step=2)
    monkeypatch.undo()
    prompts = [prompt_of(length, length) for length in (5, 6, 7, 12)]
    emitted: dict[int, list[int]] = {}
    for prompt in prompts:
        emitted[session.add(prompt, 40 if len(prompt[0]) < 12 else 20, eos_token_id=[])] = []
        while len(prompt[0]) < 12 and len(session._running) < len(emitted):
            for update in session.step():
                emitted[update.request_id] += update.tokens
    for _ in range(60):
        for update in session.step():
            emitted[update.request_id] += update.tokens
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
    recorder = Recorder()
    tokens_of(decoder, 5, Graphs(recorder))
    assert recorder.replays > 6
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


def test_sequences_go_in_and_come_out_and_padding_goes_back():
    graphs, sequences = Graphs(Recorder()), sequences_of(4)
    for turn in (1, 2, 3):
        result = graphs.run("kind", counted, sequences, 3, [])
        assert result[:3].tolist() == [[7 + turn, 3 + 2 * turn]] * 3
        assert sequences.token.tolist() == [7 + turn] * 3 + [0]
        assert sequences.seq_lens.tolist() == [3 + 2 * turn] * 3 + [0]
    other = sequences_of(4)
    assert graphs.run("kind", counted, other, 4, []).tolist() == [[8, 5]] * 4
    assert len(graphs) == 1


def test_graphs_are_kept_by_kind_and_size_up_to_a_number():
    recorder = Recorder()
    graphs = Graphs(recorder, most=2)

    def run(kind: str, count: int, temperature: float = 0.0) -> bool:
        graphs.run(kind, counted, sequences_of(count, temperature), count, [])
        return graphs.recorded

    assert [run("a", 1), run("a", 1), run("b", 1), run("a", 1)] == [True, False, True, False]
    assert run("a", 2)  # in the place of b, which was not used for longest
    assert not run("a", 1)
    assert run("b", 1)
    assert run("a", 1, temperature=0.5)
    assert len(graphs) == 2


def test_what_moved_drops_the_graphs():
    recorder, sequences = Recorder(), sequences_of(1)
    graphs, weight = Graphs(recorder), torch.nn.Parameter(torch.ones(3))
    graphs.run("kind", counted, sequences, 1, [weight])
    with torch.no_grad():
        weight.add_(1)
    graphs.run("kind", counted, sequences, 1, [weight])
    assert recorder.captures == 1
    weight.data = torch.zeros(3)
    graphs.run("kind", counted, sequences, 1, [weight])
    assert recorder.captures == 2
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("count", "free", "missing"), [(1, 9, 0), (2, 9, 0), (3, 9, 1), (5, 3, 3), (5, 2, 0), (8, 0, 0)]
)
def test_padding_takes_slots_that_are_free(count, free, missing):
    assert Graphs.padding(count, free) == missing


def test_a_look_is_seen():
    graphs = Graphs(Recorder())
    with pytest.raises(AssertionError, match="looks at a value"):
        graphs.run("kind", lambda sequences: sequences.token * int(sequences.token[0]), sequences_of(1), 1, [])


@pytest.mark.parametrize("num_blocks", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_round_has_no_values_to_look_at(temperature, num_blocks):
    """On the device "meta" there are none, and no branch for the CPU is taken."""
    model = models.adapt(tiny_model())
    model = model.with_exit(random_exit(model, 1, num_blocks).of(model)).to("meta")
    with torch.inference_mode():
        cache = model.decoder.new_cache(4, 64)
        sequences = SequenceTensors.of([0, 0], [5, 9], [3, 1], [1, 2], [temperature] * 2, torch.device("meta"))
        round_ = FusedRound(model, cache)
        assert round_.speculate(sequences, 1, 3, 0.0 if temperature else 0.25).shape == (2, 5)
        assert round_.advance(sequences, model.num_layers).shape == (2, 2)
        looked_up = LookedUp.of([[1, 2, 3], [4]], model.vocab_size, torch.device("meta"))
        assert round_.verify(replace(sequences, looked_up=looked_up)).shape == (2, 5)


def test_where_there_is_no_card_rounds_are_called(monkeypatch):
    assert graph.for_device(torch.device("cpu")) is None
    assert isinstance(graph.for_device(torch.device("cuda")), Graphs)
    monkeypatch.setenv("LAYERSKIP_GRAPHS", "0")
    assert graph.for_device(torch.device("cuda")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive"])
def test_cuda_graphs_give_the_same_tokens(strategy, kind):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak").to("cuda"), exit_layer=1, num_speculations=3)
    graphs = graph.for_device(decoder.model.device)
    given = {"strategy": strategy, "sampling": SAMPLING[kind]}
    assert tokens_of(decoder, 5, graphs, **given) == tokens_of(decoder, 5, None, **given)
    assert graphs is not None
    assert len(graphs) > 0
