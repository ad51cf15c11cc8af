"""General prose, to replay in training, and to measure the full depth's perplexity on, before and after it."""

from __future__ import annotations

from layerskip.training.data import Example

from .summarization import papers

SPLITS = ("train", "test")
WORDS = 90  # of a passage


def load(split: str) -> list[Example]:
    """The documents cut into passages: completions without a prompt; ``group`` is the document's number."""
    made = []
    for number, document in enumerate(documents(split)):
        words = document.split(" ")
        for begin in range(0, len(words), WORDS):
            made.append(Example("", " ".join(words[begin : begin + WORDS]), f"{split} {number}"))
    return made


def documents(split: str) -> list[str]:
    """Introductions and conclusions of ACLSum's papers; for ``test`` also Python's own reference manual.

    The manual (``pydoc_data.topics``) is never trained on, so the test set holds one domain that training has
    neighbours of and one that it hasn't.

    Parameters
    ----------
    split : str
        ``train`` or ``test``.
    """
    texts = [
        " ".join(sentence for section in ("introduction", "conclusion") for sentence in paper["sentences"][section])
        for paper in papers(split)
    ]
    return texts if split == "train" else texts + _manual()


def _manual() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics) if len(topics[name]) > 2000]
