"""Decoding beside peers: processes that answer, weights in other forms, the table."""

from __future__ import annotations

from contextlib import ExitStack

import gguf
import pytest
import quantized_checkpoints as layouts
import torch
from test_gguf import metadata, read
from test_gguf import write as write_gguf
from tokenizers_of import byte_level
from transformers import AutoModelForCausalLM

from benchmarks.peers import processes
from benchmarks.peers.__main__ import Run, check
from benchmarks.peers.models import TYPES, write
from benchmarks.peers.processes import MissingPeerError, Worker
from benchmarks.peers.report import Measured, markdown, picture
from benchmarks.peers.ways import OURS, Way
from layerskip.models.dequantized import dequantized

READY = {"load": 1.0, "version": "1"}


def measured(name="autoregressive", weights="bf16", engine=OURS, tokens=((1, 2, 3),), seconds=0.5, plain=True):
    class Process:
        ready = READY

    one = Measured(Way(engine, name, weights, plain=plain), Process())
    for text in tokens:
        one.take({"tokens": list(text), "first_tokens": 1, "first": 0.1, "seconds": seconds, "peak_mib": 100.0})
    one.take_first(16, {"first": 0.2})
    return one


@pytest.mark.parametrize("kind", TYPES)
def test_a_gguf_holds_the_same_weights(tmp_path, kind):
    model = layouts.tiny("llama3", head_dim=32).bfloat16().float()
    write_gguf(tmp_path / "like.gguf", layouts.tiny("llama3", head_dim=32), {})
    write(model, kind, gguf.GGUFReader(tmp_path / "like.gguf"), tmp_path / "made.gguf")
    found = dequantized(read(tmp_path / "made.gguf", model)).state_dict()
    for name, weight in model.state_dict().items():
        # Of a block's largest: half a step of -127 … 127; one of -8 … 7, whose positive end is short; half of 0 … 15. A
        # step, or a least value, is rounded to fp16.
        own = "q8_0" if kind.startswith("q4") and ("embed" in name or "lm_head" in name) else kind
        most = {"bf16": 0, "q8_0": 0.5 / 127, "q4_0": 1 / 8, "q4_1": 1 / 15}[own] if weight.dim() == 2 else 0
        most += 2**-11 if most else 0
        assert (found[name] - weight).abs().max() <= most * weight.abs().max(), name


def test_settings_are_those_of_the_other_file(tmp_path):
    model = layouts.tiny()
    writer = gguf.GGUFWriter(tmp_path / "like.gguf", "llama")
    metadata(writer, model)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    like = gguf.GGUFReader(tmp_path / "like.gguf")
    write(model, "q8_0", like, tmp_path / "made.gguf")
    made = gguf.GGUFReader(tmp_path / "made.gguf")
    told = {name for name in like.fields if not name.startswith("GGUF.")}
    assert told == {name for name in made.fields if not name.startswith("GGUF.")}
    assert len(told) > 10
    for name in told - {"general.file_type"}:
        assert made.fields[name].contents() == like.fields[name].contents()
    assert made.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


@pytest.mark.parametrize("engine", ["layerskip", "transformers"])
def test_a_process_that_answers(tmp_path, engine):
    layouts.tiny("llama3", head_dim=32).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    settings = {"model": str(tmp_path), "threads": 1}
    if engine == "layerskip":
        settings |= {"strategy": "self_speculative", "exit_layer": 2, "num_speculations": 2, "max_seq_len": 64}
    worker = Worker(engine, settings)
    try:
        answers = [worker.decode([5, 6, 7], count) for count in (3, 8)]
    finally:
        worker.close()
    assert worker.ready["load"] > 0
    assert worker.ready["version"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for answer, count in zip(answers, (3, 8), strict=True):
        assert 1 <= len(answer["tokens"]) <= count
        assert all(0 <= token < model.config.vocab_size for token in answer["tokens"])
        assert 1 <= answer["first_tokens"] <= len(answer["tokens"])
        assert answer["first"] > 0
        assert answer["seconds"] >= 0
        assert answer["peak_mib"] > 10
    assert answers[1]["tokens"][:3] == answers[0]["tokens"]


def test_what_is_not_installed_is_said_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "ENVIRONMENTS", tmp_path)
    with pytest.raises(MissingPeerError, match=r"python -m benchmarks\.peers --install llama\.cpp"):
        Worker("llama.cpp", {})


def test_a_model_that_cannot_be_loaded_is_said_in_its_own_words(tmp_path):
    with pytest.raises(MissingPeerError, match="nowhere"):
        Worker("layerskip", {"model": str(tmp_path / "nowhere"), "threads": 1, "strategy": "autoregressive"})


def test_the_figures_of_a_way():
    ours = measured(tokens=[(1, 2, 3), (1, 2, 3, 4)], seconds=0.5)
    other = measured("generate", "q8_0", "llama.cpp", [(1, 2, 3), (1, 2, 9, 4)], seconds=0.25)
    row = other.row(ours)
    assert row["tokens/s"] == (2 + 3) / 0.5
    assert row["over ours, autoregressive, bf16"] == 2
    assert row["same texts"] == 0.5
    table = markdown("parsing", [ours.row(ours), row], {"openvino q8_0, generate": "it is not installed"})
    lines = table.splitlines()
    assert lines[2].startswith("| llama.cpp, generate | q8_0 | 10 | 2.00× | 50% |")
    assert lines[3].startswith("| layerskip, autoregressive | bf16 | 5 | 1.00× | 100% |")
    assert "openvino q8_0, generate: not measured, it is not installed" in table
    assert picture({"parsing": {"rows": [row]}}).startswith(b"\x89PNG")


def test_our_tokens_must_not_depend_on_drafts():
    plain, drafted = measured(), measured("self-speculative", tokens=[(1, 2, 4)], plain=False)
    check([plain, measured("generate", engine="transformers", tokens=[(9,)])])
    with pytest.raises(RuntimeError, match="layerskip bf16, self-speculative: its tokens are not"):
        check([plain, drafted])


def test_a_way_that_ends_in_the_middle_is_measured_no_more(tmp_path, monkeypatch):
    dying = tmp_path / "worker.py"
    dying.write_text(
        "import json, sys\nprint(json.dumps({'load': 1, 'version': '1'}), flush=True)\n"
        "for number, line in enumerate(sys.stdin):\n"
        "    if number == 3: sys.exit('out of memory')\n"
        "    answer = {'tokens': [1, 2], 'first_tokens': 1, 'first': 0.1, 'seconds': 0.1, 'peak_mib': 1}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    monkeypatch.setattr(processes, "WORKER", dying)
    run = Run()
    with ExitStack() as stack:
        run.load(Way(OURS, "self-speculative", "bf16"), stack, [[1], [1, 2]], 2)
        (one,) = run.measured
        for _ in range(3):
            run.ask(one, [1], 2, one.take)
        assert run.measured == []
        assert run.skipped == {"layerskip bf16, self-speculative": "it ended with 1: out of memory"}
        assert len(one.texts) == 1  # after two to warm up
        run.load(Way(OURS, "autoregressive", "bf16", plain=True), stack, [[1]], 2)
        run.ask(run.measured[0], [1], 2, lambda answer: None)
        with pytest.raises(RuntimeError, match="which all are compared with, could not be measured: it ended with 1"):
            run.ask(run.measured[0], [1], 2, lambda answer: None)


def test_a_process_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    hanging = tmp_path / "worker.py"
    hanging.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(processes, "WORKER", hanging)
    monkeypatch.setattr(processes, "LIMIT", 0.5)
    with pytest.raises(MissingPeerError, match="it ended with -9: no message"):
        Worker(OURS, {})


def test_texts_that_end_at_their_first_token_have_no_speed():
    ended = measured("generate", engine="transformers", tokens=[(1,)], seconds=0.0)
    assert ended.row(measured())["tokens/s"] == 0
    assert measured().row(ended)["over ours, autoregressive, bf16"] == 0
