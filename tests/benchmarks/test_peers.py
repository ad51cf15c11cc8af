"""Decoding beside peers: methods that answer, weights in other forms, the table."""

from __future__ import annotations

import itertools
import json
import sys
from contextlib import ExitStack
from types import ModuleType

import gguf
import numpy as np
import pytest
import quantized_checkpoints as layouts
import torch
from gguf_files import metadata, read
from gguf_files import write as write_gguf
from tokenizers_of import byte_level
from transformers import AutoModelForCausalLM

from benchmarks.harness import MissingPeerError
from benchmarks.peers import __main__ as command
from benchmarks.peers import methods
from benchmarks.peers.__main__ import Run, check
from benchmarks.peers.methods import OURS, TYPES, Method, Worker, write
from benchmarks.peers.report import Measured, markdown, page, picture
from benchmarks.peers.worker import _drafts_of
from layerskip.cli.export import first_layers
from layerskip.models.adaptation import dequantized

READY = {"load": 1.0, "version": "1"}


def measured(name="autoregressive", weights="bf16", engine=OURS, tokens=((1, 2, 3),), seconds=0.5, plain=True):
    class Process:
        ready = READY

    one = Measured(Method(engine, name, weights, plain=plain), Process())
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
        most = {"bf16": 0, "f16": 0, "q8_0": 0.5 / 127, "q4_0": 1 / 8, "q4_1": 1 / 15}[own] if weight.dim() == 2 else 0
        most += 0 if kind == "bf16" or weight.dim() == 1 else 2**-11
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


def test_first_layers_in_a_file_of_their_own(tmp_path):
    model = layouts.tiny("llama3", head_dim=32).bfloat16().float()
    write_gguf(tmp_path / "like.gguf", layouts.tiny("llama3", head_dim=32), {})
    shallow = first_layers(model, 2)
    write(shallow, "bf16", gguf.GGUFReader(tmp_path / "like.gguf"), tmp_path / "made.gguf")
    made = gguf.GGUFReader(tmp_path / "made.gguf")
    assert made.fields["llama.block_count"].contents() == 2 < model.config.num_hidden_layers
    found = dequantized(read(tmp_path / "made.gguf", shallow)).state_dict()
    assert found.keys() == shallow.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in shallow.state_dict().items())


def test_drafts_of_a_model_for_llama_cpp(monkeypatch):
    binding = ModuleType("llama_cpp.llama_speculative")
    binding.LlamaDraftModel = object
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", binding)

    class Model:
        def generate(self, tokens, temp):
            assert temp == 0.0
            return itertools.count(tokens[-1] + 1)

    found = _drafts_of(Model(), 3)(np.array([4, 7], np.intc))
    assert found.dtype == np.intc
    assert found.tolist() == [8, 9, 10]


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


@pytest.mark.parametrize(
    ("engine", "made_by"),
    [("llama.cpp", r"python -m benchmarks\.peers --install llama\.cpp"), ("vllm", r"make .*/\.built")],
)
def test_what_is_not_installed_is_said_with_its_command(tmp_path, monkeypatch, engine, made_by):
    monkeypatch.setattr(methods, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(methods, "VLLM", tmp_path)
    with pytest.raises(MissingPeerError, match=made_by):
        Worker(engine, {})


def test_a_stopped_run_goes_on_behind_the_tasks_that_it_finished(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(args, name):
        asked.append(name)
        if asked == ["parsing", "coding"]:
            raise KeyboardInterrupt
        return {"rows": [measured().row(measured())], "skipped": {"vllm": f"{name}: no"}, "samples": []}

    monkeypatch.setattr(command, "_measure", measure)
    words = ["--tasks", "parsing", "coding", "--output", str(tmp_path / "run")]
    with pytest.raises(KeyboardInterrupt, match=r"1 of 2 tasks are in .*run\.partial, the same command goes on there"):
        command.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    with pytest.raises(ValueError, match=r"limit was 4 and is 3; --overwrite"):
        command.main([*words, "--limit", "3"])
    command.main(words)
    assert asked == ["parsing", "coding", "coding"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.md", "run.png"]
    tasks = json.loads((tmp_path / "run.json").read_text())["tasks"]
    assert {name: task["skipped"]["vllm"] for name, task in tasks.items()} == {
        "parsing": "parsing: no", "coding": "coding: no"
    }  # fmt: skip
    assert capsys.readouterr().out.count("| layerskip, autoregressive | bf16 |") == 2


def test_the_page_says_who_is_best():
    ours = measured(seconds=0.2)
    rows = [one.row(ours) for one in (
        ours, measured("self-speculative", "int8", seconds=0.1, plain=False),
        measured("the layerskip plugin", engine="vllm", seconds=0.05, plain=False),
        measured("generate", engine="vllm", seconds=0.1), measured("generate", "q8_0", "llama.cpp", seconds=0.4),
    )]  # fmt: skip
    settings = {"limit": 1, "max_new_tokens": 4, "first_token": [16], "repeat": 1}
    tasks = {"parsing": {"rows": rows, "skipped": {"openvino f16, generate": "it is not installed"}}}
    report = {"machine": {"cpu": "chip", "isa": "avx2", "threads": 2}, "settings": settings, "tasks": tasks}
    text = page(report, "run")
    assert "\n\nchip, avx2, 2 threads; layerskip 1, vllm 1, llama.cpp 1 (`python -m" in text
    assert text.endswith("](run.png)\n")
    assert "| vllm, the layerskip plugin | bf16 | **40 (4.00×)** | 100 | 1.0 | 0.200 |" in text
    assert "- parsing, openvino f16, generate: it is not installed" in text
    lines = [line for line in text.splitlines() if "| parsing |" in line]
    own, best, other = "layerskip, autoregressive, bf16", "vllm, the layerskip plugin, bf16", "vllm, generate, bf16"
    assert lines[0] == f"| tokens/s, without drafts, 16 bits | parsing | 10.0 ({own}) | 20.0 ({other}) | **0.50×** |"
    assert lines[1] == f"| tokens/s, whatever is fastest | parsing | 40.0 ({best}) | 20.0 ({other}) | 2.00× |"
    assert lines[2] == f"| first token of 16, s | parsing | 0.200 ({own}) | 0.200 ({other}) | 1.00× |"


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
    monkeypatch.setattr(methods, "WORKER", dying)
    run = Run()
    with ExitStack() as stack:
        run.load(Method(OURS, "self-speculative", "bf16"), stack, [[1], [1, 2]], 2)
        (one,) = run.measured
        for _ in range(3):
            run.ask(one, [1], 2, one.take)
        assert run.measured == []
        assert run.skipped == {"layerskip bf16, self-speculative": "it ended with 1: out of memory"}
        assert len(one.texts) == 1  # after two to warm up
        run.load(Method(OURS, "autoregressive", "bf16", plain=True), stack, [[1]], 2)
        run.ask(run.measured[0], [1], 2, lambda answer: None)
        with pytest.raises(RuntimeError, match="which all are compared with, could not be measured: it ended with 1"):
            run.ask(run.measured[0], [1], 2, lambda answer: None)


def test_a_process_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    hanging = tmp_path / "worker.py"
    hanging.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(methods, "WORKER", hanging)
    monkeypatch.setattr(methods, "LIMIT", 0.5)
    with pytest.raises(MissingPeerError, match="it ended with -9: no message"):
        Worker(OURS, {})


def test_texts_that_end_at_their_first_token_have_no_speed():
    ended = measured("generate", engine="transformers", tokens=[(1,)], seconds=0.0)
    assert ended.row(measured())["tokens/s"] == 0
    assert measured().row(ended)["over ours, autoregressive, bf16"] == 0
