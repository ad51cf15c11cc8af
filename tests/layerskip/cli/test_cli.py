"""The commands on a tiny model from disk: what they print and write, and how they fail."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exits_of import copied_exit, random_exit
from helpers import save_tiny, tiny_tokenizer
from rich.console import Console
from tiny import ROUND, VOCABULARY, generous, requires_native, tiny_model
from tokenizers_of import byte_level

import layerskip_kernels
from layerskip import DraftHead, devices
from layerskip.cli import bench, demo, env, main
from layerskip.cli import options as cli_options
from layerskip.cli.arguments import COMMANDS, Prompt, parse, read_prompts
from layerskip.cli.bench import (
    AUTOREGRESSIVE,
    EARLY_EXIT_ASSISTED,
    SELF_SPECULATIVE,
    TRANSFORMERS,
    Report,
    Run,
    Stopwatch,
)
from layerskip.cli.correctness import first_difference
from layerskip.cli.rendering import pieces, table
from layerskip.decoding import SelfSpeculativeDecoder, Stats
from layerskip.models import adapt, load
from layerskip_kernels import dispatch

pytestmark = pytest.mark.usefixtures("one_thread")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model"), "llama2"))


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "w5 w8 w13", "task": "counting"}, {"prompt": "w2 w3", "task": "prose"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return str(path)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["generate", "x", "--model", "/nowhere"], "/nowhere"),
            (["generate", "x", "--model", "MODEL", "--exit-layer", "4"], "exit_layer must be in 1 … 3"),
            (["generate", "x", "--model", "MODEL", "--draft-head", "/nowhere"], "no draft head at /nowhere"),
            (["generate", "x", "--model", "MODEL", "--exit", "/nowhere"], "no exit at /nowhere"),
            (["generate", "x", "--model", "MODEL", "--exit", "MODEL"], "no exit at"),
            (["generate", "", "--model", "MODEL"], "the prompt is empty"),
            (["generate", "w1", "--model", "MODEL", "--max-new-tokens", "256"], "more than max_seq_len=256"),
            (["generate", "w1", "--model", "MODEL", "--chat"], "no chat template"),
            (["bench", "--model", "MODEL", "--prompts", "/nowhere.txt"], "no prompts file at /nowhere.txt"),
            (["bench", "--model", "MODEL", "--max-new-tokens", "1"], "must be at least 2"),
            (
                ["generate", "w1", "--model", "MODEL", "--temperature", "-1"],
                "temperature must be in [0, 1e+06], got -1.0",
            ),
            (["generate", "w1", "--model", "MODEL", "--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
            (
                ["generate", "w1", "--model", "MODEL", "--draft-threshold", "1.5"],
                "draft_threshold must be in [0, 1], got 1.5",
            ),
        ],
    )
    def test_one_line_and_exit_code_2(self, directory, capsys, arguments, message):
        assert main([directory if argument == "MODEL" else argument for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"layerskip {arguments[0]}: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1

    def test_bad_arguments(self, capsys):
        for arguments in ([], ["nonsense"], ["bench", "--num-speculations", "0"], ["generate", "--dtype", "int4"]):
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == 2
        assert "must be at least 1, got 0" in capsys.readouterr().err

    def test_a_traceback_can_be_had(self):
        with pytest.raises(FileNotFoundError):
            main(["--traceback", "generate", "x", "--model", "/nowhere"])

    def test_every_command_has_help(self, capsys):
        for command in COMMANDS:
            with pytest.raises(SystemExit) as stop:
                main([command, "--help"])
            assert stop.value.code == 0
        assert "exit-layer" in capsys.readouterr().out


class TestPrompts:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{not json", "line 3: not JSON"),
            (b"[1, 2]", "line 3: expected an object with a prompt"),
            (b'{"text": "x"}', 'line 3: expected a text under "prompt", got None'),
            (b'{"prompt": "  "}', "line 3: expected a text"),
            (b'{"prompt": 7}', "got 7"),
            (b'{"prompt": "x", "task": 1}', 'line 3: expected a text under "task", got 1'),
            (b"\xff\xfe", "line 3: not UTF-8"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, message):
        path = tmp_path / "bad.jsonl"
        path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
        with pytest.raises(ValueError, match=message):
            read_prompts(str(path))

    def test_a_text_file_has_one_prompt_a_line(self, tmp_path):
        path = tmp_path / "some.txt"
        path.write_text("one\n\n  two  \n")
        assert [prompt.text for prompt in read_prompts(str(path))] == ["one", "two"]
        path.write_text("\n")
        with pytest.raises(ValueError, match="has no prompts"):
            read_prompts(str(path))

    def test_the_samples_cover_three_tasks_and_a_limit_spreads_over_them(self):
        samples = read_prompts("samples")
        assert len(samples) >= 20
        assert {prompt.task for prompt in samples} == {"semantic parsing", "coding", "prose"}
        assert {prompt.task for prompt in read_prompts("samples", 6)} == {"semantic parsing", "coding", "prose"}


class TestGenerate:
    def test_text_goes_to_stdout_and_statistics_to_stderr(self, directory, capsys):
        assert main(["generate", "w5 w8", "--model", directory, "--max-new-tokens", "9", "--exit-layer", "2"]) == 0
        speculative = capsys.readouterr()
        arguments = ["generate", "w5 w8", "--model", directory, "--max-new-tokens", "9"]
        assert main([*arguments, "--strategy", "autoregressive"]) == 0
        assert len(speculative.out.split()) == 9
        assert "drafts accepted" in speculative.err
        assert capsys.readouterr().out == speculative.out

    def test_a_seed_repeats_what_is_drawn(self, directory, capsys):
        printed = []
        for seed in ("3", "3", "4"):
            arguments = ["--temperature", "1.2", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.001", "--seed", seed]
            assert main(["generate", "w5 w8", "--model", directory, "--max-new-tokens", "9", *arguments]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1] != printed[2]

    def test_it_ends_before_a_stop_string(self, directory, capsys):
        arguments = ["generate", "w5 w8", "--model", directory, "--max-new-tokens", "20"]
        assert main(arguments) == 0
        whole = capsys.readouterr()
        words = whole.out.split()
        stop = f"{words[7]} {words[8]}"
        before, _, after = whole.out.partition(stop)
        assert min(map(len, (before.split(), after.split()))) > 1
        assert main([*arguments, "--stop", stop, "--stop", "nothing says this"]) == 0
        cut = capsys.readouterr()
        assert cut.out == before + "\n"
        assert cut.err.startswith(f"{len((before + stop).split())} tokens in"), "decoding ends with the text"

    def test_an_empty_stop_string_is_refused_before_the_model_is_loaded(self, directory, capsys, monkeypatch):
        monkeypatch.setattr(cli_options, "load", lambda *args: pytest.fail("loaded"))
        assert main(["generate", "w5", "--model", directory, "--stop", ""]) == 2
        assert "stop_strings must not hold an empty string" in capsys.readouterr().err

    def test_a_system_message_comes_first(self, directory, tmp_path, capsys):
        shutil.copytree(directory, tmp_path / "chat")
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}w9"
        (tmp_path / "chat" / "chat_template.jinja").write_text(template)
        arguments = ["--max-new-tokens", "9"]
        written = []
        for words in (
            ["user: w5 w9", "--model", directory], ["w5", "--model", str(tmp_path / "chat"), "--chat"],
            ["system: w8 user: w5 w9", "--model", directory],
            ["w5", "--model", str(tmp_path / "chat"), "--system", "w8"],
        ):  # fmt: skip
            assert main(["generate", *words, *arguments]) == 0
            written.append(capsys.readouterr().out)
        assert written[0] == written[1] != written[2] == written[3]

    @pytest.mark.parametrize("option", ["--top-k=5", "--top-p=0.9", "--min-p=0.1"])
    def test_greedy_decoding_says_what_it_ignores(self, directory, capsys, option):
        arguments = ["generate", "w5 w8", "--model", directory, "--max-new-tokens", "3"]
        told = f"layerskip generate: {option.partition('=')[0]} without --temperature has no effect: decoding is greedy"
        assert main([*arguments, option]) == 0
        assert capsys.readouterr().err.splitlines()[0] == told
        assert main([*arguments, option, "--temperature", "0.5"]) == 0
        assert "greedy" not in capsys.readouterr().err

    def test_a_closed_pipe_ends_it_quietly(self, directory):
        words = [sys.executable, "-m", "layerskip.cli", "generate", "w5 w8", "--model", directory]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=100) == 1
        process.stderr.close()

    def test_a_threshold_ends_drafts_and_changes_no_token(self, directory, capsys):
        printed = []
        for threshold in ("0", "1"):
            arguments = ["--max-new-tokens", "9", "--exit-layer", "2", "--draft-threshold", threshold]
            assert main(["generate", "w5 w8", "--model", directory, *arguments]) == 0
            printed.append(capsys.readouterr())
        assert printed[0].out == printed[1].out
        assert "drafts accepted" in printed[0].err
        assert "drafts accepted" not in printed[1].err, "no exit of this model is ever sure"

    @pytest.mark.parametrize("source", ["ngram", "auto"])
    def test_the_source_of_drafts_changes_no_token(self, directory, capsys, source):
        printed = []
        for options in (["--strategy", "autoregressive"], ["--draft-source", source]):
            arguments = ["--max-new-tokens", "40", *options]
            assert main(["generate", "w5 w8 w5 w8", "--model", directory, *arguments]) == 0
            printed.append(capsys.readouterr())
        assert printed[0].out == printed[1].out
        assert "drafts accepted" in printed[1].err

    def test_the_prompt_may_come_from_stdin(self, directory, capsys, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("w5 w8"))
        assert main(["generate", "--model", directory, "--max-new-tokens", "3"]) == 0
        assert len(capsys.readouterr().out.split()) == 3

    def test_a_saved_draft_head_beside_the_model(self, directory, tmp_path, capsys):
        DraftHead(range(0, VOCABULARY, 3), VOCABULARY).save(tmp_path)
        arguments = ["generate", "w5 w8", "--model", directory, "--max-new-tokens", "9"]
        assert main(arguments) == 0
        plain = capsys.readouterr().out
        assert main([*arguments, "--draft-head", str(tmp_path)]) == 0
        assert capsys.readouterr().out == plain


@requires_native
class TestCorrectness:
    def arguments(self, directory, texts):
        options = ["--max-new-tokens", "12", "--num-speculations", "3", "--dtype", "bfloat16"]
        return ["correctness", "--model", directory, "--prompts", texts, *options]

    @pytest.mark.parametrize("threshold", ["0", "0.02"])
    def test_all_is_well(self, directory, texts, capsys, threshold):
        assert main([*self.arguments(directory, texts), "--draft-threshold", threshold]) == 0
        printed = capsys.readouterr().out
        assert printed.count("✓") == 4
        assert "all tokens are identical" in printed

    def test_a_wrong_token_is_exit_code_1(self, directory, texts, capsys, monkeypatch):
        monkeypatch.setattr(ROUND, generous)
        assert main(self.arguments(directory, texts)) == 1
        assert "✗ at new token" in capsys.readouterr().out

    def test_first_difference(self):
        assert first_difference([1, 2], [1, 2]) is None
        assert first_difference([1, 2], [1, 3]) == 1
        assert first_difference([1, 2], [1]) == 1


class TestBench:
    def test_it_measures_four_ways_and_writes_what_it_found(self, directory, texts, tmp_path, capsys):
        stem = tmp_path / "result"
        options = ["--max-new-tokens", "8", "--num-speculations", "3", "--dtype", "float32", "--repeats", "2"]
        options += ["--draft-threshold", "0.01", "--exit-layer", "1"]
        code = main(["bench", "--model", directory, "--prompts", texts, "--output", str(stem), *options])
        printed = capsys.readouterr().out
        assert code == 0, printed
        content = json.loads((tmp_path / "result.json").read_text())
        assert list(content["summary"]) == [AUTOREGRESSIVE, SELF_SPECULATIVE, TRANSFORMERS, EARLY_EXIT_ASSISTED]
        assert all(len(runs) == 4 for runs in content["runs"].values())
        assert content["summary"][AUTOREGRESSIVE]["speedup_of_means"] == 1.0
        assert content["settings"]["draft_threshold"] == 0.01
        assert content["read_gigabytes_per_second"] > 0.1
        assert set(content["by_task"]) == {"counting", "prose"}
        assert (tmp_path / "result.png").read_bytes().startswith(PNG)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "result.json", "result.png"]
        assert "✓ self-speculative and autoregressive tokens are identical" in printed

    @pytest.mark.parametrize("source", ["ngram", "auto"])
    def test_it_tells_the_drafts_of_each_source(self, directory, texts, tmp_path, capsys, source):
        options = ["--max-new-tokens", "60", "--only-ours", "--draft-source", source, "--output", str(tmp_path / "out")]
        options += ["--exit-layer", "1", "--num-speculations", "4"]
        assert main(["bench", "--model", directory, "--prompts", texts, *options]) == 0
        content = json.loads((tmp_path / "out.json").read_text())
        runs = [run["drafts"]["by_source"] for run in content["runs"][SELF_SPECULATIVE]]
        assert content["settings"]["draft_source"] == source
        counts = {name: count for run in runs for name, count in run.items()}
        assert counts.keys() == {"ngram"} if source == "ngram" else counts.keys() & {"exit", "ngram"}
        assert all(drafted >= accepted for drafted, accepted in counts.values())
        known = content["summary"][SELF_SPECULATIVE]["megabytes_per_token"]
        assert (known > 0) == (source == "ngram"), "with auto nobody knows what a round read"
        printed = " ".join(capsys.readouterr().out.split())
        assert "drafts accepted, by source (and place in the round): " in printed
        assert f"drafts from {source}" in printed

    def test_batches_and_auto_against_a_sweep(self, directory, texts, tmp_path, capsys):
        options = ["--max-new-tokens", "8", "--batch-sizes", "1", "3", "--sweep", "--exit-layer", "auto"]
        options += ["--num-speculations", "auto", "--dtype", "float32", "--output", str(tmp_path / "result")]
        code = main(["bench", "--model", directory, "--prompts", texts, *options])
        printed = capsys.readouterr().out
        assert code == 0, printed
        content = json.loads((tmp_path / "result.json").read_text())
        assert EARLY_EXIT_ASSISTED not in content["summary"], "transformers has no auto"
        assert [batch["size"] for batch in content["throughput"]] == [1, 3]
        for batch in content["throughput"]:
            assert batch["identical"]
            assert set(batch["tokens_per_second"]) == {AUTOREGRESSIVE, SELF_SPECULATIVE, TRANSFORMERS}
        swept = [(task["task"], task["draft_threshold"]) for task in content["sweep"]]
        assert swept == [("counting", 0.0), ("counting", 0.5), ("prose", 0.0), ("prose", 0.5)]
        for task in content["sweep"]:
            assert set(task["fixed"]) == {f"E={e}, K={k}" for e in (1, 2, 3) for k in (1, 2, 4, 8, 12)}
            assert set(task["by_source"]) == {"ngram", "auto"}
            assert min(task["by_source"].values()) > 0
        assert "tokens/s of a batch" in printed
        assert "auto / best" in printed

    def test_rows_of_a_batch_count_up_to_their_ends(self, directory):
        """In ours and in transformers' alike: the padding after an EOS token is no token."""
        model, _ = load(directory, dtype=torch.float32)
        prompts = [torch.tensor([5, 6, 7]), torch.tensor([9, 8])]
        free = SelfSpeculativeDecoder(model, 1).generate(prompts, 12, eos_token_id=[]).new_tokens
        model.generation_config.eos_token_id = int(free[0, 3])
        model.generation_config.pad_token_id = 0
        decoder = SelfSpeculativeDecoder(model, 1)
        rows = bench._our_batch(decoder, prompts, 12, "self_speculative")
        assert len(rows[0]) <= 4 < 12
        assert rows == bench._their_batch(model, prompts, 12)
        encoded = [prompt[None] for prompt in prompts]
        (batch,) = bench.measure_batches(decoder, None, encoded, [2], 12)
        assert batch.identical

    def test_no_speedup_counts_when_tokens_differ(self, directory, texts, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(ROUND, generous)
        stem = str(tmp_path / "result")
        options = ["--max-new-tokens", "16", "--only-ours", "--output", stem]
        assert main(["bench", "--model", directory, "--prompts", texts, *options]) == 1
        assert "no speedup counts" in capsys.readouterr().out

    def test_both_definitions_of_speedup(self):
        base = [Run(0, 10, 1.0, 0.1, 1, 100e6), Run(1, 10, 2.0, 0.1, 1, 100e6)]  # 10 and 5 tokens/s
        fast = [Run(0, 10, 0.5, 0.1, 1, 50e6, 8, 6), Run(1, 10, 0.5, 0.1, 1, 50e6, 8, 2)]  # 20 and 20
        report = Report({}, ["a", "b"], {AUTOREGRESSIVE: base, SELF_SPECULATIVE: fast}, bandwidth=2.0)
        row = report.summary(SELF_SPECULATIVE)
        assert row["speedup_of_means"] == 20 / 7.5
        assert row["mean_speedup"] == (2 + 4) / 2
        assert row["acceptance_rate"] == 0.5
        assert row["gigabytes_per_second"] == pytest.approx(1.0)
        assert row["fraction_of_bandwidth"] == pytest.approx(0.5)
        assert report.by_task()["b"][SELF_SPECULATIVE]["mean_speedup"] == 4

    def test_bytes_per_token(self):
        from layerskip.cli.bench import bytes_per_token

        decoder = SelfSpeculativeDecoder(tiny_model(upper="silent"), 1, 3)
        model = decoder.model
        plain = decoder.generate(torch.ones(1, 4, dtype=torch.int64), 9, strategy="autoregressive").stats
        unread = model.embedding.nbytes  # one row of it a token
        weights = sum(weight.nbytes for weight in model.parameters()) - unread
        per_position = 2 * 4 * 4 * 8 * 4  # keys and values, 4 layers, 4 heads of 8 in fp32
        assert bytes_per_token(model, plain) == weights + per_position * (4 + 9 / 2)
        out = decoder.generate(torch.ones(1, 4, dtype=torch.int64), 9).stats
        assert (out.rounds, out.drafted) == (2, 6)
        layer = (weights - model.head.norm_weight.nbytes - model.head.head_weight.nbytes) / 4
        head = model.head.norm_weight.nbytes + model.head.head_weight.nbytes
        context = per_position / 4 * (4 + 9 / 2)
        expected = (8 * (layer + context) + 6 * head + 2 * (3 * (layer + context) + head)) / 8
        assert bytes_per_token(model, out, 1) == pytest.approx(expected)

    def test_bytes_per_token_of_an_exit(self):
        from layerskip.cli.bench import bytes_per_token

        stock = adapt(tiny_model())
        decoder = SelfSpeculativeDecoder(stock, 1, 3, exit=random_exit(stock, 1, 2))
        keys_and_values = 2 * (2 * 4 * 8 * 4) * (4 + 9 / 2)  # of 2 draft layers, 4 heads of 8 in fp32
        draft_layers = sum(weight.nbytes for weight in decoder.model.decoder.draft_layer_weights) + keys_and_values
        stats = decoder.generate(torch.ones(1, 4, dtype=torch.int64), 9).stats
        plain, more = (bytes_per_token(model, stats, 1) for model in (stock, decoder.model))
        assert more - plain == pytest.approx((stats.drafted + stats.rounds) * draft_layers / 8)

    def test_an_exit_with_draft_layers(self, directory, texts, tmp_path, capsys):
        copied_exit(adapt(load(directory, torch.float32)[0]), 2, 2).save(tmp_path)
        options = ["--max-new-tokens", "8", "--dtype", "float32", "--exit", str(tmp_path), "--only-ours", "--sweep"]
        assert main(["bench", "--model", directory, "--prompts", texts, "--output", str(tmp_path / "b"), *options]) == 0
        printed = capsys.readouterr().out
        assert "E=2 of 4" in printed
        content = json.loads((tmp_path / "b.json").read_text())
        assert content["settings"]["exit"] == str(tmp_path)
        assert content["summary"][SELF_SPECULATIVE]["acceptance_rate"] == 1.0
        assert set(content["sweep"][0]["fixed"]) == {f"E=2, K={k}" for k in (1, 2, 4, 8, 12)}
        arguments = ["--model", directory, "--prompts", texts, *options[:6]]
        assert main(["correctness", *arguments]) == 0
        assert "all tokens are identical" in capsys.readouterr().out
        assert main(["exits", *arguments, "--output", str(tmp_path / "e")]) == 0
        printed = capsys.readouterr().out.splitlines()
        (row,) = (line for line in printed if "2 + 2 draft layers" in line)
        assert "100.0%" in row
        (row,) = (line for line in printed if "n-grams" in line)
        assert row.count("–") == 2, "nothing says how sure a lookup is"

    def test_the_stopwatch_leaves_out_the_first_group(self, monkeypatch):
        """Put at 10, 13, 14 and 18 s: the prompt, two tokens, one, four."""
        clock = iter((10.0, 13.0, 14.0, 18.0))
        monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
        watch = Stopwatch()
        for count in (5, 2, 1, 4):
            watch.put(torch.zeros(count))
        assert (watch.tokens, watch.first_tokens) == (5, 2)
        assert watch.time_to_first_token == 3.0
        assert watch.seconds == 5.0


class TestEnv:
    def test_every_op_is_listed_with_who_serves_it(self, capsys):
        assert main(["env"]) == 0
        printed = capsys.readouterr().out
        for op in env.example_arguments("cpu"):
            assert op in printed
        assert torch.__version__ in printed
        facts = [line.split() for line in printed.splitlines()]
        assert ["--device", "auto", devices.described(devices.find("auto"))] in facts
        for backend in dispatch.BACKENDS:
            assert any(line[1:2] == [backend] for line in facts), "each says that it is ready, or why not"
        assert ["layerskip-kernels", version("layerskip-kernels")] in facts
        assert any(line[:1] == ["layerskip-smollm2"] for line in facts)

    def test_no_op_is_forgotten(self):
        from layerskip_kernels.schemas import SCHEMAS

        assert set(env.example_arguments("cpu")) == {op for op in SCHEMAS if not op.endswith("_backward")}

    def test_the_examples_can_be_called(self):
        for op, arguments in env.example_arguments("cpu").items():
            getattr(torch.ops.layerskip, op)(*arguments)

    def test_why_a_backend_is_not_there(self, capsys, monkeypatch):
        monkeypatch.setattr(dispatch, "reason_against", lambda op, backend, args: f"no {backend} [today]")
        assert main(["env"]) == 0
        printed = capsys.readouterr().out
        for backend in dispatch.BACKENDS:
            assert f"no {backend} [today]" in printed

    def test_the_reasons_are_shown(self, capsys):
        with layerskip_kernels.use_backend("reference"):
            main(["env"])
        assert capsys.readouterr().out.count("reference") >= len(env.example_arguments("cpu"))


class TestTables:
    ROW = ("1995.48231", "0.0001234", "8192 of 49152", "w5 w8 w13 w5 w8 w13 w5 w8 w13 w5 w8 w13", "12345678.9")
    COLUMNS = ("tokens/s", "seconds", "rows", "prompt", "bytes a token")

    @pytest.mark.parametrize("width", [30, 60, 80])
    def test_no_digit_is_lost_in_a_narrow_terminal(self, width):
        console = Console(file=io.StringIO(), width=width)
        console.print(table("speed", self.COLUMNS, [self.ROW]))
        printed = console.file.getvalue()
        lines = [line[1:].split("│") for line in printed.splitlines() if line.startswith("│")]
        cells = ["".join(part[column].strip() for part in lines) for column in range(len(self.ROW))]
        assert [cell.replace(" ", "") for cell in cells] == [cell.replace(" ", "") for cell in self.ROW]
        assert "…" not in printed

    def test_piped_lines_are_not_broken_at_80_columns(self, directory, texts, capsys, monkeypatch):
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr(env, "run", lambda args, console: console.print(table("t", self.COLUMNS, [self.ROW])))
        assert main(["env"]) == 0
        printed = capsys.readouterr().out
        assert all(cell in printed for cell in self.ROW)


def last_line(printed):
    return printed.splitlines()[-1]


class TestDraftOptions:
    """An option that is given, then layerskip.json beside the model, then auto."""

    @pytest.fixture
    def tuned_model(self, tmp_path):
        folder = save_tiny(tmp_path / "model")
        (folder / "layerskip.json").write_text(json.dumps({"exit_layer": 2, "num_speculations": 3}))
        return folder

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ([], (2, 3, "exit")),
            (["--num-speculations", "5"], (2, 5, "exit")),
            (["--draft-source", "ngram"], (2, 3, "ngram")),
            (["--exit-layer", "1"], (1, 4, "exit")),
            (["--exit-layer", "auto"], ("auto", "auto", "auto")),
        ],
        ids=str,
    )
    def test_the_file_beside_the_model(self, tuned_model, given, expected):
        args = parse(["bench", "--model", str(tuned_model), *given])
        decoder = cli_options.decoder(args, load(tuned_model)[0])
        assert (decoder.exit_layer, decoder.num_speculations, decoder.draft_source) == expected
        (tuned_model / "layerskip.json").unlink()
        if not given:
            decoder = cli_options.decoder(args, load(tuned_model)[0])
            assert (decoder.exit_layer, decoder.num_speculations, decoder.draft_source) == ("auto",) * 3

    @pytest.mark.parametrize("command", ["generate", "bench", "correctness", "eval"])
    def test_every_command_reads_it(self, tuned_model, texts, tmp_path, monkeypatch, capsys, command):
        if command == "eval":
            pytest.importorskip("lm_eval", reason="needs lm_eval")
        read = []

        def recorded(name, *rest):
            read.append(Path(name))
            raise ValueError("read")

        monkeypatch.setattr(cli_options, "tuned", recorded)
        more = {
            "generate": ["w5"], "bench": ["--prompts", texts, "--output", str(tmp_path / "out")],
            "correctness": ["--prompts", texts, "--skip-transformers"],
            "eval": ["spec", "--limit", "1", "--output", str(tmp_path / "out.json")],
        }  # fmt: skip
        assert main([command, "--model", str(tuned_model), *more[command]]) == 2
        assert read == [tuned_model]


class TestDemo:
    @pytest.fixture
    def subject(self, monkeypatch):
        some = [Prompt("w5 w8 w13", "counting"), Prompt("w2 w3", "prose")]
        decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 3)
        exhibit = demo.Exhibit("tiny", "a tiny one", 1, 3, "A tiny model.", Path())
        subject = demo.Subject(exhibit, decoder, tiny_tokenizer(), some)
        monkeypatch.setattr(demo, "load_subjects", lambda args, console: [subject])
        return subject

    def run(self, tmp_path):
        console = Console(file=io.StringIO(), width=100)
        args = argparse.Namespace(max_new_tokens=24, output=tmp_path / "demo.png")
        return demo.run(args, console), console.file.getvalue()

    def test_it_shows_both_ways_and_draws(self, subject, tmp_path):
        code, printed = self.run(tmp_path)
        assert code == 0
        assert printed.count("✓ identical tokens") == 2
        assert "A tiny model." in printed
        assert str(tmp_path / "demo.png") in printed
        assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
        assert re.fullmatch(r"All 2 prompts: \d+\.\d\d× as fast with drafts, and the same tokens\.", last_line(printed))

    def test_the_speedup_is_that_of_the_seconds_after_the_first_token(self):
        def row(plain, speculative):
            both = [SimpleNamespace(stats=Stats(3, 9, (), 0.5 + took, 0.5)) for took in (plain, speculative)]
            return demo.SideBySide(Prompt("w5"), "tiny", *both)

        assert demo._speedup([row(4.0, 1.0)]) == pytest.approx(4)
        assert demo._speedup([row(4.0, 1.0), row(2.0, 2.0)]) == pytest.approx(2)

    def test_a_counterexample_is_one_line_and_does_not_count(self, subject, tmp_path, monkeypatch):
        slow = replace(subject.exhibit, label="With layer 3", remark="Below 1 it is slower.", counterexample=True)
        subjects = [subject, subject._replace(exhibit=slow, prompts=subject.prompts[:1])]
        monkeypatch.setattr(demo, "load_subjects", lambda args, console: subjects)
        code, printed = self.run(tmp_path)
        assert code == 0
        assert re.search(r"With layer 3: \d+\.\d\d×\. Below 1 it is slower\.", printed)
        assert last_line(printed).startswith("All 2 prompts")

    @pytest.mark.parametrize(
        ("source", "title"),
        [
            ("exit", "1 of 4 layers and 2 trained for it draft; 4 layers verify"),
            ("ngram", "n-grams draft; 4 layers verify"),
            ("auto", "1 of 4 layers and 2 trained for it, or n-grams, draft; 4 layers verify"),
        ],
    )
    def test_it_says_what_drafts(self, subject, tmp_path, monkeypatch, source, title):
        model = tiny_model(upper="weak")
        copied_exit(adapt(model), 1, 2).save(tmp_path)
        decoder = SelfSpeculativeDecoder(model, 1, 3, exit=str(tmp_path), draft_source=source)
        shown = subject._replace(decoder=decoder)
        monkeypatch.setattr(demo, "load_subjects", lambda args, console: [shown])
        code, printed = self.run(tmp_path)
        assert code == 0
        assert title in printed

    def test_different_tokens_are_not_passed_over(self, subject, tmp_path, monkeypatch):
        monkeypatch.setattr(ROUND, generous)
        code, printed = self.run(tmp_path)
        assert code == 1
        assert "✗ the tokens differ" in printed

    def test_accepted_drafts_have_their_colour(self, subject):
        out = subject.decoder.generate(torch.tensor([[5, 8]]), 24)
        text = demo.coloured(subject.tokenizer, out)
        assert text.plain == subject.tokenizer.decode(out.new_tokens[0])
        green = sum(span.style == demo.ACCEPTED for span in text.spans)
        assert green == out.stats.accepted > 0

    def test_a_character_of_several_tokens_is_shown_once_it_is_whole(self):
        tokenizer = byte_level()
        assert pieces(tokenizer, (), tokenizer("aж☃b").input_ids) == ["a", "", "ж", "", "", "☃", "b"]
