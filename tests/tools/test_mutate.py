"""`tools.mutate`: its list matches the code, it recognizes caught bugs, and the checkout does not change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import mutate
from tools.mutations import MUTATIONS, Mutation

CODE = "def larger(a, b):\n    return a if a >= b else b\n"
TEST = "from code_under_test import larger\n\n\ndef test_larger():\n    assert larger(1, 2) == 2\n"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "code_under_test.py").write_text(CODE)
    (root / "test_code.py").write_text(TEST)
    (root / "notes.txt").write_text("not tracked")
    for command in (["init", "-q"], ["add", "code_under_test.py", "test_code.py"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(mutate, "ROOT", root)
    return root


def bug(name: str, old: str, new: str, tests: str = "test_code.py") -> Mutation:
    return Mutation(name, "code_under_test.py", old, new, tests)


def run(monkeypatch: pytest.MonkeyPatch, *mutations: Mutation, words: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr(mutate, "MUTATIONS", mutations)
    return mutate.main(words)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_list_fits_the_code(mutation: Mutation) -> None:
    text = (mutate.ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    files = mutation.tests.partition(" -k ")[0].split()
    assert files
    assert all((mutate.ROOT / name).is_file() for name in files)


def test_tests_inside_vllm_have_an_environment_of_their_own(
    checkout: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("VLLM_VENV", str(tmp_path))
    python = tmp_path / "bin" / "python"
    assert mutate.interpreter("tests/layerskip/models/test_exit.py") == Path(sys.executable)
    inside = bug("one inside vLLM", "a >= b", "a < b", "tests/vllm/test_code.py")
    assert run(monkeypatch, inside, bug("the smaller", "a >= b", "a < b")) == 0
    printed = capsys.readouterr().out
    assert f"one inside vLLM is not planted: its tests run in {python}, which make test-vllm" in printed
    assert printed.endswith("1 of 1 caught\n")
    python.parent.mkdir()
    python.write_text(
        "#!/bin/sh\necho FAILED tests/vllm/test_code.py::test_one; test -n \"$(grep '>=' code_under_test.py)\"\n"
    )
    python.chmod(0o755)
    assert run(monkeypatch, inside) == 0
    assert (
        "one inside vLLM (code_under_test.py): caught by tests/vllm/test_code.py::test_one" in capsys.readouterr().out
    )


def test_no_name_is_there_twice() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert not any("|" in name for name in names), "a column of the table"
    assert len(names) == len(set(names)) >= 40


def test_what_is_caught_and_what_is_not(checkout: Path, monkeypatch, capsys) -> None:
    caught = bug("the smaller", "a >= b", "a < b")
    assert run(monkeypatch, caught) == 0
    assert "the smaller (code_under_test.py): caught by test_code.py::test_larger" in capsys.readouterr().out
    assert run(monkeypatch, caught, bug("equal", "a >= b", "a > b")) == 1
    assert capsys.readouterr().out.endswith("1 of 2 caught\nnot caught: equal\n")
    assert (checkout / "code_under_test.py").read_text() == CODE


def test_each_bug_is_alone_in_the_copy(checkout: Path, monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    run(monkeypatch, bug("the smaller", "a >= b", "a < b"), words=("--folder", str(folder)))
    assert (folder / "code_under_test.py").read_text() == CODE
    assert not (folder / "notes.txt").exists()


def test_a_bug_of_the_library_is_gone_from_it_before_the_next(checkout: Path, monkeypatch, capsys) -> None:
    (checkout / "csrc/cpu").mkdir(parents=True)
    (checkout / "csrc/cpu/value.h").write_text("right")
    (checkout / "test_library.py").write_text("def test_it():\n    assert open('library').read() == 'right'\n")
    subprocess.run(["git", "add", "."], cwd=checkout, check=True)
    monkeypatch.setattr(
        mutate, "build", lambda copy: (copy / "library").write_text((copy / "csrc/cpu/value.h").read_text())
    )
    compiled = Mutation("wrong", "csrc/cpu/value.h", "right", "wrong", "test_library.py")
    assert run(monkeypatch, compiled, bug("equal", "a >= b", "a > b", "test_library.py")) == 1
    assert capsys.readouterr().out.endswith("1 of 2 caught\nnot caught: equal\n")


def test_the_table_says_what_is_left(checkout: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    """A bug that has a row is not tried again, unless nothing caught it; a row that fits no bug goes."""
    document = tmp_path / "mutations.md"
    document.write_text(f"{mutate.HEAD}| an old one | `x.py` | `test` | 1 |\n")
    words = ("--output", str(document))
    smaller, equal = bug("the smaller", "a >= b", "a < b"), bug("equal", "a >= b", "a > b")
    assert run(monkeypatch, smaller, equal, words=words) == 1
    table = document.read_text()
    assert table.startswith(f"{mutate.HEAD}| the smaller | `code_under_test.py` | `test_code.py::")
    assert "| equal | `code_under_test.py` | **not caught** |" in table
    assert "an old one" not in table
    (checkout / "test_code.py").write_text(TEST + "    assert type(larger(1, 1.0)) is int\n")
    capsys.readouterr()
    assert run(monkeypatch, smaller, equal, words=words) == 0
    assert capsys.readouterr().out.endswith("1 of 1 caught\n")
    assert document.read_text().count("`test_code.py::test_larger`") == 2
    document.write_text("another page")
    with pytest.raises(ValueError, match="is not a table of planted bugs"):
        run(monkeypatch, smaller, words=words)


def test_compiled_triton_kernels_are_not_interpreted(checkout: Path, monkeypatch) -> None:
    (checkout / "compiled").mkdir()
    code = "import os\n\n\ndef test_it():\n    assert os.environ.get('TRITON_INTERPRET') {} '0'\n"
    (checkout / "compiled/test_c.py").write_text(code.format("=="))
    (checkout / "test_i.py").write_text(code.format("!="))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert mutate.failure("./compiled/test_c.py", checkout) is None
    assert mutate.failure("test_i.py", checkout) is None


def test_an_interrupt_leaves_no_bug_behind(checkout: Path) -> None:
    def stopped() -> None:
        with mutate.planted(bug("the smaller", "a >= b", "a < b"), checkout):
            assert "a < b" in (checkout / "code_under_test.py").read_text()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (checkout / "code_under_test.py").read_text() == CODE


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (bug("gone", "a > b", "a < b"), "gone: code_under_test.py has 'a > b' 0 times, must have it once"),
        (bug("twice", "a", "b"), "twice: code_under_test.py has 'a' [0-9]+ times"),
        (bug("no test", "a >= b", "a < b", "test_code.py -k nothing"), "pytest test_code.py -k nothing could not run"),
    ],
)
def test_a_bug_that_cannot_be_tried(checkout: Path, monkeypatch, mutation: Mutation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, mutation)


def test_tests_that_fail_anyway_catch_nothing(checkout: Path, monkeypatch) -> None:
    (checkout / "test_code.py").write_text(TEST.replace("== 2", "== 3"))
    with pytest.raises(ValueError, match=r"test_code.py::test_larger fails with no bug planted"):
        run(monkeypatch, bug("the smaller", "a >= b", "a < b"))


def test_the_checkout_is_no_place_for_the_copy(checkout: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="must not be the checkout"):
        run(monkeypatch, bug("the smaller", "a >= b", "a < b"), words=("--folder", str(checkout)))
    with pytest.raises(ValueError, match="--only nothing names no bug"):
        run(monkeypatch, bug("the smaller", "a >= b", "a < b"), words=("--only", "nothing"))
