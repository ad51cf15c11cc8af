"""What the commands take and refuse: near names at once, help that can be read, errors of one line, exit codes."""

from __future__ import annotations

import codecs
import importlib
import json
import pkgutil
import re
import signal
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

import layerskip
from layerskip import registry, training
from layerskip.cli import main
from layerskip.cli.arguments import COMMANDS, DTYPES, SOURCES, STRATEGIES, parse, read_prompts
from layerskip.training import read_pairs

MISTYPED = [
    (["gnerate", "x"], "layerskip: unknown command 'gnerate'; did you mean generate?"),
    (["bench", "--dtpe", "x"], "layerskip bench: unknown option --dtpe; did you mean --dtype"),
    (["bench", "--promts=x"], "layerskip bench: unknown option --promts; did you mean --prompts"),
    (["bench", "--dtype", "bfloat6"], "unknown dtype 'bfloat6'; did you mean bfloat16"),
    (["bench", "--dtype", "int4"], "unknown dtype 'int4'; "),
    (["generate", "--strategy", "early"], "unknown strategy 'early'; did you mean early_exit?"),
    (["generate", "--strategy", "x"], "unknown strategy 'x'; known: self_speculative, autoregressive, early_exit"),
    (["generate", "--device", "gpu"], "unknown device 'gpu', expected auto, cpu, cuda or cuda:N"),
    (["generate", "--top-k", "many"], "argument --top-k: must be a whole number, got 'many'"),
    (["generate", "--top-p", "many"], "argument --top-p: must be a number, got 'many'"),
    (["bench", "--exit-layer", "atuo"], "argument --exit-layer: must be a whole number, got 'atuo'"),
    (["bench", "--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
    (["env", "x"], "layerskip env: unexpected argument 'x'"),
    (["distill"], "layerskip distill: the following arguments are required: --output"),
    (["report", "x.json"], "layerskip report: the following arguments are required: -o/--output"),
    ([], "layerskip: the following arguments are required: command"),
]
ABSENT = [
    (["generate", "x", "--model", "smolm2"], "unknown model 'smolm2'; did you mean smollm2?"),
    (["generate", "x", "--model", "./moddel"], "no such directory: moddel; did you mean model?"),
    (["generate", "x", "--model", "./model", "--draft-head", "itn8"], "no draft head at itn8; did you mean int8?"),
    (["demo", "smolm2"], "unknown demo 'smolm2'; did you mean smollm2?"),
    (["bench", "--prompts", "sampels"], "no prompts file at sampels; did you mean samples?"),
    (["bench", "--prompts", "parsin:test"], "unknown task 'parsin'; did you mean parsing?"),
    (["bench", "--prompts", "toys:tset"], "task toys has no split 'tset'; did you mean test?"),
    (
        ["bench", "--prompts", "toys"],
        "no prompts file at toys; of the task toys, name a split: toys:train or toys:test",
    ),
    (["train", "--set", "tasks=[toyz]"], "unknown task 'toyz'; did you mean toys?"),
    (
        ["train", "--set", "tasks=[recipe.yaml]", "--set", "model=smolm2"],
        "unknown model 'smolm2'; did you mean smollm2?",
    ),
    (["train", "--set", "stepz=3"], "recipe: unknown key 'stepz', did you mean 'steps'?"),
    (["report", "recipe.json", "-o", "r.html"], "no measurements at recipe.json; did you mean recipe.yaml?"),
    (["train", "recipe.yml"], "no recipe at recipe.yml; did you mean recipe.yaml?"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a recipe, and a package with a task."""
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "toys-1.dist-info").mkdir()
    (tmp_path / "toys-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1\n")
    (tmp_path / "toys-1.dist-info/entry_points.txt").write_text("[layerskip.tasks]\ntoys = toys_provider\n")
    (tmp_path / "toys_provider.py").write_text('SPLITS = ("train", "test")\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


class TestNames:
    @pytest.mark.parametrize(("arguments", "message"), MISTYPED, ids=lambda value: " ".join(value)[:30])
    def test_a_mistyped_argument(self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert re.fullmatch(r".*\(see layerskip.* --help\)\n", printed.err)
        assert printed.out == ""

    @pytest.mark.parametrize(("arguments", "message"), ABSENT, ids=lambda value: " ".join(value)[:30])
    def test_a_name_of_nothing(
        self, here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"layerskip {arguments[0]}: {message}")
        assert printed.count("\n") == 1

    def test_nothing_slow_is_imported_for_them(self, here: Path) -> None:
        code = """
import contextlib, json, sys
from layerskip.cli import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit):
        main(arguments)
print(sorted({"torch", "transformers", "numpy", "matplotlib"} & sys.modules.keys()))
"""
        calls = [*(arguments for arguments, _ in (*MISTYPED, *ABSENT)), ["--version"], ["bench", "--help"]]
        path = [str(here), *filter(None, sys.path)]
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{code}", json.dumps(calls)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == "[]"
        assert done.stderr.count("layerskip") >= len(MISTYPED) + len(ABSENT)

    def test_they_are_those_of_the_library(self) -> None:
        import torch

        from layerskip.decoding import draft_sources, validation

        assert SOURCES == draft_sources.SOURCES
        assert STRATEGIES == validation.STRATEGIES
        assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)

    def test_what_is_near(self) -> None:
        assert registry.nearest("tset", ["train", "test"]) == "did you mean test?"
        assert registry.nearest("x", ["train", "test"]) == "known: train, test"


class TestHelp:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["--version"])
        assert stop.value.code == 0
        assert capsys.readouterr().out == f"layerskip-kernels {version('layerskip-kernels')}\n"

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_option_says_what_it_is_and_its_default_once(
        self, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "1000")  # a line for each
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = capsys.readouterr().out
        described = re.sub(r"\n {20,}", "   ", printed.partition("options:")[2]).strip().splitlines()
        assert len(described) >= 2
        for option in described:
            _, text = re.split(r" {2,}", option.strip(), maxsplit=1)
            assert text.count("default") <= 1, option
        for oddity in ("None", "False", "[]", "<", "Path", "PosixPath", " THREADS", " SEED", " OUTPUT", " LIMIT"):
            assert oddity not in printed
        assert command in ("env", "report") or "--device" in printed

    def test_defaults_are_what_is_used(self) -> None:
        args = parse(["bench"])
        assert (args.num_speculations, args.dtype, args.device, args.limit) == (None, "bfloat16", "auto", 6)
        assert str(args.output) == "layerskip-bench"

    def test_what_is_written_is_called_output_everywhere(self) -> None:
        """In the commands, in tools and in benchmarks."""
        for name in ("demo", "bench", "exits"):
            assert str(parse([name, "--output", "here"]).output) == "here"
        root = Path(__file__).parents[3]
        sources = [*root.glob("tools/*.py"), *root.glob("benchmarks/*.py"), *root.glob("python/**/*.py")]
        other = re.compile(r'(?:add_argument|option)\(\s*"--(out|write|json|out-\w+)"')
        assert sources
        assert [path.name for path in sources if other.search(path.read_text(encoding="utf-8"))] == []


class TestEnds:
    @pytest.fixture
    def ends_with(self, monkeypatch: pytest.MonkeyPatch):
        """Let ``layerskip env`` do something."""

        def put(work) -> None:
            monkeypatch.setattr("layerskip.cli.env.run", lambda args, console: work())

        return put

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (ValueError("no\nsuch [b]thing"), 2, "no such [b]thing"),
            (FileExistsError("there"), 2, "there"),
            (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
            (FloatingPointError("NaN in layer 3"), 1, "NaN in layer 3"),
            (RuntimeError("CUDA out of memory"), 1, "RuntimeError: CUDA out of memory (--traceback shows where)"),
            (KeyError("x"), 1, "KeyError: 'x' (--traceback shows where)"),
            (AssertionError(), 1, "AssertionError (--traceback shows where)"),
        ],
    )
    def test_an_error_is_one_line(self, ends_with, capsys, error: Exception, code: int, line: str) -> None:
        def fail() -> None:
            raise error

        ends_with(fail)
        assert main(["env"]) == code
        assert capsys.readouterr().err == f"layerskip env: {line}\n"
        for arguments in (["--traceback", "env"], ["env", "--traceback"]):
            with pytest.raises(type(error)):
                main(arguments)

    def test_an_interrupt_is_one_line(self, ends_with, capsys) -> None:
        ends_with(lambda: signal.raise_signal(signal.SIGINT))
        assert main(["env"]) == 130
        assert capsys.readouterr().err == "interrupted\n"

    def test_an_interrupt_while_a_command_is_imported(self, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("layerskip.cli.import_module", lambda *args: signal.raise_signal(signal.SIGINT))
        assert main(["env"]) == 130
        assert capsys.readouterr().err == "interrupted\n"

    def test_advice_of_transformers_is_kept_out(self, ends_with, capsys) -> None:
        def advise() -> int:
            for module in ("transformers.modeling_utils", "peft.tuners", "accelerate.state", "layerskip.somewhere"):
                warnings.warn_explicit(f"of {module}", FutureWarning, "file", 1, module=module)
            return 0

        ends_with(advise)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(["env"]) == 0
        assert capsys.readouterr().err == "layerskip env: of layerskip.somewhere\n"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(["--traceback", "env"]) == 0
        assert [str(warning.message) for warning in caught] == ["of layerskip.somewhere"]


class TestFiles:
    def test_a_byte_order_mark_is_no_part_of_the_text(self, tmp_path: Path) -> None:
        pair = json.dumps({"prompt": "one", "completion": "two"}).encode()
        lines, text = tmp_path / "some.jsonl", tmp_path / "some.txt"
        lines.write_bytes(codecs.BOM_UTF8 + pair + b"\r\n" + pair + b"\r\n")
        text.write_bytes(codecs.BOM_UTF8 + b"one\n")
        assert [prompt.text for prompt in read_prompts(str(lines))] == ["one", "one"]
        assert [prompt.text for prompt in read_prompts(str(text))] == ["one"]
        assert read_pairs(lines) == [{"prompt": "one", "completion": "two"}] * 2

    def test_a_line_of_pairs_ends_at_a_newline_alone(self, tmp_path: Path) -> None:
        """Not at what Unicode calls a line separator, which JSON need not escape."""
        path = tmp_path / "some.jsonl"
        pair = {"prompt": "one\u2028two", "completion": "three\x85"}
        path.write_text(json.dumps(pair, ensure_ascii=False) + "\n", encoding="utf-8")
        assert read_pairs(path) == [pair]


@pytest.mark.parametrize("package", [layerskip, training], ids=lambda package: package.__name__)
def test_what_a_package_exports_can_be_had(package) -> None:
    """Each on its own, and none is hidden by a module of its name."""
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(package.__all__)
    assert dir(package) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(importlib.import_module(package.__name__), name) is not None
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018
