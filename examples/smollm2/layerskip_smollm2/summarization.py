"""Summarization: an abstract to a sentence each on challenge, approach and outcome (Takeshita et al. 2024, ACLSum).

Split by paper, as shipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layerskip.training.data import Example

SPLITS = ("train", "validation", "test", "excerpts")

EXCERPT = 4  # sentences
_ASPECTS = ("challenge", "approach", "outcome")


def papers(split: str) -> list[dict[str, Any]]:
    """Records of ACLSum with ``id``, ``summary`` (by aspect) and ``sentences`` (by section).

    Raises
    ------
    ModuleNotFoundError
        Where the package ``aclsum`` is absent.
    """
    package = find_spec("aclsum")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("summarization needs the package aclsum: pip install aclsum")
    name = {"validation": "val"}.get(split, split)
    path = Path(package.submodule_search_locations[0]) / "dataset" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def load(split: str) -> list[Example]:
    """Examples of ``split``; ``group`` is the paper. Those of ``excerpts`` have no completion: a model may write it."""
    if split == "excerpts":
        return list(_excerpts())
    return [
        Example(
            _prompt(paper["sentences"]["abstract"]),
            " " + " ".join(paper["summary"][aspect].strip() for aspect in _ASPECTS),
            paper["id"],
        )
        for paper in papers(split)
    ]


def _prompt(sentences: list[str]) -> str:
    return f"Abstract: {' '.join(sentences)}\nSummary:"


def _excerpts() -> Iterator[Example]:
    """Passages of the training papers: four sentences, every two sentences."""
    for paper in papers("train"):
        for section in ("abstract", "introduction", "conclusion"):
            sentences = paper["sentences"][section]
            for begin in range(0, max(1, len(sentences) - EXCERPT + 2), 2):
                yield Example(_prompt(sentences[begin : begin + EXCERPT]), "", paper["id"])
