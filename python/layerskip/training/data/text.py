"""General prose: what the full depth's perplexity is measured on, before and after training."""

from __future__ import annotations

from ._example import Example
from .summarization import papers

SPLITS = ("train", "test")


def load_text(split: str = "test") -> list[str]:
    """Documents: introductions and conclusions of ACLSum's papers; for ``test`` also Python's own reference manual.

    The manual (``pydoc_data.topics``) is never trained on, so the test set holds one domain that training has
    neighbours of and one that it hasn't.

    Parameters
    ----------
    split : str
        ``train`` or ``test``.
    """
    if split not in SPLITS:
        raise ValueError(f"general text has no split {split!r}; it has: {', '.join(SPLITS)}")
    documents = [
        " ".join(sentence for section in ("introduction", "conclusion") for sentence in paper["sentences"][section])
        for paper in papers(split)
    ]
    return documents if split == "train" else documents + _manual()


def passages(split: str = "train", words: int = 90) -> list[Example]:
    """The documents of `load_text` cut into passages of so many words: completions without a prompt."""
    made = []
    for number, document in enumerate(load_text(split)):
        parts = document.split(" ")
        for begin in range(0, len(parts), words):
            made.append(Example("", " ".join(parts[begin : begin + words]), f"{split} {number}"))
    return made


def _manual() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics) if len(topics[name]) > 2000]
