"""Summarization: an abstract to a sentence each on challenge, approach and outcome (Takeshita et al. 2024, ACLSum).

Split by paper, as shipped.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ._example import Example

SPLITS = ("train", "validation", "test")

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
    """Examples of ``split``; ``group`` is the paper."""
    return [
        Example(
            f"Abstract: {' '.join(paper['sentences']['abstract'])}\nSummary:",
            " " + " ".join(paper["summary"][aspect].strip() for aspect in _ASPECTS),
            paper["id"],
        )
        for paper in papers(split)
    ]
