"""Benchmarks of the ops: only correct variants are timed, interleaved with their peers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from tiny import requires_native
from torch import Tensor

import layerskip_kernels
from benchmarks import __main__ as command
from benchmarks import cases, harness
from benchmarks.cases import MODELS, OPS, Make, Shape
from benchmarks.harness import CPU, Group, Variant, measure
from benchmarks.tables import markdown, page, skipped
from layerskip_kernels import multiplies_panels
from layerskip_kernels.formats import dequantize, is_interleaved, quantize
from layerskip_kernels.formats import rows_of as as_rows

TINY = Shape(D=64, F=96, H=4, G=2, C=32, V=300)
FORMATS = ["bf16", "int8", "int4"]
PACKED = ("linear", "swiglu", "partial_forward", "exit_head")
PEERS = {peer.name: peer for peer in harness.PEERS}


class Memory:
    def sample(self):
        return 10.0


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(harness, "ROTATED_BYTES", 2**20)
    monkeypatch.setattr(harness, "MOST_COPIES", 3)
    monkeypatch.setattr(cases, "CONTEXT", 40)
    monkeypatch.setattr(cases, "TRAINED_ROWS", 5)
    monkeypatch.setattr(harness, "PEERS", [PEERS["torch"]])


def case_of(op, counts=(1, 5)):
    torch.manual_seed(0)
    return OPS[op](TINY, list(counts), Make(CPU))


def measured(case, formats=FORMATS, backends=("cpu", "reference")):
    """The rows of a case."""
    with torch.inference_mode(False):
        for group in harness.groups(case, "tiny", formats, backends, CPU):
            with torch.inference_mode():
                yield from list(measure(group, 2, Memory()))


@requires_native
@pytest.mark.parametrize("op", OPS)
def test_every_way_is_right_and_timed(op):
    case = case_of(op)
    rows = list(measured(case))
    formats = FORMATS if op in PACKED else ["bf16"]
    found = [(row["rows"], row["variant"], row["weights"]) for row in rows]
    expected = []
    for number, count in enumerate(case.counts):
        for backend in ("cpu", "reference") if number == 0 else ("cpu",):
            expected += [(count, backend, form) for form in formats]
        expected.append((count, "torch", "bf16"))
    assert found == expected
    for row in rows:
        assert 0 <= row["error"] < harness.MOST_ERROR
        assert 0 < row["cold"]["p10"] <= row["cold"]["median"] <= row["cold"]["p90"]
        assert len(row["seconds"]) == 2
        assert row["GB/s"] == pytest.approx(row["bytes"] / row["cold"]["median"] / 1e9)
        assert row["version"].startswith("torch 2." if row["variant"] == "torch" else "layerskip-kernels ")


@requires_native
@pytest.mark.parametrize("op", OPS)
def test_a_kernel_that_is_wrong_is_noticed(op):
    case = case_of(op)

    def doubled(*args):
        found = case.ours(*args)
        return found * 2 if isinstance(found, Tensor) else tuple(one * 2 for one in found)

    rows = list(measured(replace(case, ours=doubled), ["bf16"], ["cpu"]))
    ours = [row for row in rows if row["variant"] == "cpu"]
    assert len(ours) == len(case.counts)
    assert all("error of" in row["wrong"] and "cold" not in row for row in ours)
    assert all("cold" in row for row in rows if row["variant"] == "torch")


@pytest.mark.parametrize("form", FORMATS)
def test_a_large_matrix_repeats_its_rows_and_is_packed_as_a_whole(monkeypatch, form):
    monkeypatch.setattr(cases, "UNIQUE", 7)
    monkeypatch.setattr(cases, "AT_ONCE", 16)
    weight = Make(CPU).matrix(48, 64)
    assert len(weight.unique(dim=0)) == 7
    assert torch.equal(weight[7:14], weight[:7])
    (packed,) = cases.packed([weight], form)
    assert is_interleaved(packed) == (form != "bf16" and multiplies_panels())
    assert torch.equal(as_rows(packed, 64), weight if form == "bf16" else quantize(weight, form))
    x = torch.randn(3, 64)
    assert torch.allclose(cases.exact(x, packed), x @ dequantize(packed, 64).T, atol=1e-5)


@requires_native
def test_a_backend_serves_or_says_why_not():
    rows = list(measured(case_of("linear", [2]), ["bf16"], ["cuda", "cpu"]))
    assert [row["variant"] for row in rows if "cold" in row] == ["cpu", "torch"]
    assert rows[0]["variant"] == "cuda"
    assert rows[0]["skipped"].startswith("no backend serves linear (cuda: ")


@requires_native
def test_each_backend_is_the_one_that_is_called():
    forced = []
    case = case_of("linear", [2])

    def ours(*args):
        forced.append(layerskip_kernels.dispatch.forced())
        return case.ours(*args)

    list(measured(replace(case, ours=ours), ["bf16"]))
    assert forced == ["cpu"] + ["reference"] + [one for one in ("reference", "cpu", "cpu", "reference") for _ in "12"]


@requires_native
def test_a_reference_that_would_hold_too_much(monkeypatch):
    monkeypatch.setattr(harness, "REFERENCE_BYTES", 1000)
    rows = list(measured(case_of("linear", [2]), ["bf16"]))
    assert rows[1]["skipped"] == "it would hold 0.0 GiB of weights in fp32, several times"
    assert rows[1]["variant"] == "reference"


def rows_of(peer, case, formats=FORMATS):
    """Of the peer alone."""
    return [row for row in measured(case, formats, []) if row["variant"] == peer]


@pytest.mark.parametrize("op", OPS)
def test_what_is_compiled_is_what_torch_runs(monkeypatch, op):
    """With a compiler that changes nothing and records its calls."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function: seen.append(function) or function)
    monkeypatch.setattr(harness, "PEERS", [PEERS["torch.compile"]])
    rows = rows_of("torch.compile", case_of(op))
    assert len(seen) == 1
    assert all("cold" in row and row["weights"] == "bf16" for row in rows)
    assert rows


def test_torch_compiles_in_a_peer(monkeypatch):
    backends = []

    def backend(module, inputs):
        backends.append(module)
        return module.forward

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiling(function, backend=backend))
    monkeypatch.setattr(harness, "PEERS", [PEERS["torch.compile"]])
    (row,) = rows_of("torch.compile", case_of("swiglu", [3]))
    assert "cold" in row
    assert len(backends) == 1


@pytest.mark.parametrize("op", OPS)
def test_torchao_gets_the_matrices(monkeypatch, op):
    """With our packing in place of torchao's: it packs the matrices, in each format."""
    made = []

    def by_torchao(weight, form, device):
        made.append((form, weight.dim()))
        return dequantize(quantize(weight, form), weight.shape[1], torch.bfloat16)

    monkeypatch.setattr(harness, "_by_torchao", by_torchao)
    monkeypatch.setattr(harness, "_need", lambda *args: None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(harness, "PEERS", [PEERS["torchao"]])
    rows = rows_of("torchao", case_of(op))
    matrices = {"linear": 1, "swiglu": 2, "exit_head": 1, "partial_forward": 7}.get(op, 0)
    assert made == [(form, 2) for form in ("int8", "int4") for _ in range(matrices)]
    assert [row["weights"] for row in rows] == (["int8", "int4"] * 2 if matrices else [])
    assert all("cold" in row for row in rows)
    errors = {row["weights"]: row["error"] for row in rows}
    assert not matrices or 0 < errors["int8"] < errors["int4"]
    assert not list(rows_of("torchao", case_of(op), ["bf16"]))


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(harness, "PEERS", [PEERS["torchao"]])
    rows = rows_of("torchao", case_of("swiglu"))
    assert [row["weights"] for row in rows if "cold" in row] == ["int8", "int4"] * 2
    plain = 2 * TINY.F * TINY.D
    assert plain < rows[0]["bytes"] < plain * 1.2
    assert plain / 2 < rows[1]["bytes"] < plain * 0.8


@pytest.mark.parametrize(
    ("peer", "op", "reason"),
    [
        ("torchao", "linear", "it is not installed: pip install torchao"),
        ("liger", "early_exit_loss", "it needs a GPU"),
        ("cut-cross-entropy", "early_exit_loss", "it needs a GPU"),
    ],
)
def test_a_peer_that_is_absent_is_skipped_with_the_reason(monkeypatch, peer, op, reason):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    monkeypatch.setattr(harness, "PEERS", [PEERS[peer]])
    rows = rows_of(peer, case_of(op, [2]))
    assert {row["skipped"] for row in rows} == {reason}
    assert all("cold" not in row for row in rows)
    assert f"- {peer}: {reason} ({op})\n" in skipped(rows)
    assert not rows_of(peer, case_of("rms_norm", [2]))


def test_a_fused_loss_of_others_takes_the_exits_in_turn():
    """As Liger's and cut-cross-entropy's would, with torch's own in their place."""
    case = case_of("early_exit_loss")

    def entropy(states, head, labels):
        return torch.nn.functional.cross_entropy((states @ head.T).float(), labels)

    function, weights = harness._exit_by_exit(case, entropy)
    found = function(*case.inputs(5), *weights)
    assert harness.max_error(found, cases.truth(case, weights)) < harness.MOST_ERROR


def test_a_peer_that_breaks_is_skipped_and_one_that_is_wrong_is_told(monkeypatch):
    def broken(case, form, device):
        raise AssertionError("no such\nkernel")

    def raising(case, form, device):
        return lambda *args: 1 / 0, case.weights

    def wrong(case, form, device):
        return lambda x, weight: x @ weight.T + 1, case.weights

    peers = [harness.Peer(one.__name__, "torch", one, {"bf16": 0.02}) for one in (broken, raising, wrong)]
    monkeypatch.setattr(harness, "PEERS", peers)
    rows = list(measured(case_of("linear", [2]), ["bf16"], []))
    assert rows[0]["skipped"] == "it raised AssertionError: no such"
    assert rows[1]["skipped"] == "it raised ZeroDivisionError: division by zero"
    assert rows[2]["wrong"].startswith("wrong in bf16: an error of ")
    assert not any("cold" in row for row in rows)


def variant(name, value, weights="bf16", backend=None):
    return Variant(
        name, weights, lambda copy: torch.tensor([value]), 1, 8, lambda: torch.tensor([1.0]), backend=backend
    )


def test_cold_calls_rotate_and_warm_ones_stay():
    calls = []
    both = [
        Variant(name, "bf16", lambda copy, name=name: calls.append((name, copy)) or torch.ones(1), 3, 8,
                lambda: torch.ones(1))
        for name in "ab"
    ]  # fmt: skip
    rows = list(measure(Group("linear", "tiny", "1", 1, both), 3, Memory()))
    assert calls[:2] == [("a", 0), ("b", 0)]  # they were checked
    turns = [("b", 1), ("a", 2), ("a", 0), ("b", 1), ("b", 2), ("a", 0)]  # no copy that the one before has warmed
    assert calls[2:] == [turn for turn in turns for _ in ("cold", "warm")]
    assert rows[0]["memory GB/s"] == 10.0


def test_what_no_cache_holds_has_no_warm_calls(monkeypatch):
    monkeypatch.setattr(harness, "ROTATED_BYTES", 7)
    (row,) = measure(Group("linear", "tiny", "1", 1, [variant("cpu", 1.0)]), 2, Memory())
    assert "cold" in row
    assert "warm" not in row


def test_what_is_slow_is_called_less_often(monkeypatch):
    monkeypatch.setattr(harness, "MOST_SECONDS", 0)
    (row,) = measure(Group("linear", "tiny", "1", 1, [variant("cpu", 1.0)]), 9, Memory())
    assert len(row["seconds"]) == harness.LEAST_CALLS


def test_what_is_wrong_is_not_timed():
    group = Group(
        "linear", "tiny", "1", 1, [variant("cpu", 1.1), variant("cpu", float("nan"), "int8"), variant("torch", 1.0)]
    )
    wrong, broken, right = measure(group, 2, Memory())
    assert wrong["wrong"].startswith("cpu in bf16: an error of 0.1")
    assert "cold" not in wrong
    assert broken["wrong"].startswith("cpu in int8: an error of nan")
    assert right["error"] == 0
    assert "cold" in right
    assert skipped([wrong, broken, right]).count("\n- ") == 2


def test_a_result_of_another_shape_is_wrong():
    with pytest.raises(harness.WrongResultError, match=re.escape("shape (1,), expected (2,)")):
        harness.max_error([torch.ones(1)], [torch.ones(2)])


def test_a_card_is_timed_by_its_own_clock(monkeypatch):
    """Between events, the host ahead: a GPU that takes 1 ms for each thing that is put into its queue."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(queue)
            queue.append("event")

        def elapsed_time(self, other):
            return float(queue[self.at : other.at].count("call"))

        def synchronize(self):
            queue.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("sleep"))
    times = harness.seconds(lambda: queue.append("call"), 2, torch.device("cuda"))
    assert times == [1e-3, 1e-3]
    assert queue == ["sleep", "event", "call", "event", "call", "event", "wait"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command on a tiny shape."""
    monkeypatch.setitem(MODELS, "SmolLM2-135M", TINY)
    monkeypatch.setattr(command, "ReadBandwidth", lambda device: Memory())

    def call(*more):
        command.main([
            "--models", "SmolLM2-135M", "--ops", "linear", "--rows", "2", "1", "--repeats", "2", "--formats", "bf16",
            "--output", str(tmp_path / "ops"), "--threads", "1", "--device", "cpu", *more,
        ])  # fmt: skip
        return (tmp_path / "ops.md").read_text()

    return call


@requires_native
def test_the_command(tmp_path, run, capsys):
    text = run()
    rows = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert [(row["rows"], row["variant"]) for row in rows] == [
        (1, "cpu"), (1, "reference"), (1, "torch"), (2, "cpu"), (2, "torch")
    ]  # fmt: skip
    assert text == page(rows, "ops")
    assert markdown(rows) in capsys.readouterr().out
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


@requires_native
def test_a_wrong_result_fails_the_command_and_is_not_published(tmp_path, run, monkeypatch):
    monkeypatch.setattr(layerskip_kernels, "linear", lambda x, weight: torch.zeros(len(x), len(weight), dtype=x.dtype))
    with pytest.raises(RuntimeError, match="3 results are wrong, the first: linear, cpu in bf16: an error of 1 of"):
        run()
    assert len((tmp_path / "ops.jsonl").read_text().splitlines()) == 5
    assert not (tmp_path / "ops.md").exists()


@requires_native
def test_a_wrong_peer_does_not_fail_the_command(run, monkeypatch):
    wrong = harness.Peer("other", "torch", lambda case, form, device: (torch.add, (torch.ones(1),)), {"bf16": 0.02})
    monkeypatch.setattr(harness, "PEERS", [wrong])
    assert "### Not measured\n\n- other: " in run("--ops", "rms_norm")


@requires_native
def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, run, monkeypatch, capsys):
    before = run()
    finished = (tmp_path / "ops.jsonl").read_bytes()
    taken = iter([measure])  # of the second group on there is none

    def interrupted(*args):
        one = next(taken, None)
        if one is None:
            raise KeyboardInterrupt
        return one(*args)

    monkeypatch.setattr(command, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted: 3 rows are in .*ops\.unfinished"):
        run()
    assert (tmp_path / "ops.jsonl").read_bytes() == finished
    assert (tmp_path / "ops.md").read_text() == before
    capsys.readouterr()
    text = run("--measured", str(tmp_path / "ops.unfinished"))
    rows = [json.loads(line) for line in (tmp_path / "ops.unfinished").read_text().splitlines()]
    assert len(rows) == 3
    assert markdown(rows) in text
    assert (tmp_path / "ops.jsonl").read_bytes() == finished
