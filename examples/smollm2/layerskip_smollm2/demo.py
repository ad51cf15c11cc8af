"""What ``layerskip demo`` shows: the stock model with a trained exit beside it, then adapters trained for one task."""

from __future__ import annotations

from pathlib import Path

from layerskip.cli.demo import Exhibit

from .models import STOCK, TRAINED

PROMPTS = Path(__file__).parent / "prompts"

EXHIBITS = (
    Exhibit(
        STOCK, "stock model", None, None,
        "This is SmolLM2-135M-Instruct, unchanged. An exit that comes with this package was trained beside it: the "
        "first layers and a small layer of its own draft. Where the text repeats earlier text, n-grams draft instead. "
        "For every round a controller picks the faster one, and how many tokens to draft, or none, by measured speed.",
        PROMPTS / "everyday.jsonl", chat=True,
    ),
    Exhibit(
        TRAINED, "LayerSkip for commands", 4, 8,
        "The same model with a LayerSkip adapter that comes with this package: trained on home-automation commands "
        "with an early-exit loss, so that its own first layers can already predict. They draft with an int8 head of "
        "the 8192 most frequent tokens; the full model verifies all drafts of a round at once.",
        PROMPTS / "commands.jsonl", TRAINED,
    ),
    Exhibit(
        f"{TRAINED}-coding", "LayerSkip for Python", 2, "auto",
        "The same model with an adapter whose early exits were trained on what its own full depth writes. The number "
        "of draft tokens is picked by measured speed.",
        PROMPTS / "functions.jsonl", f"{TRAINED}-coding", draft_source="auto",
    ),
    Exhibit(
        STOCK, "For comparison, the stock model without a trained exit, layer 24 of 30 drafting 3 tokens a round", 24,
        3, "Below 1 it is slower: its layers were not trained to exit early, so few drafts are accepted, and each "
        "costs most of a full pass.",
        PROMPTS / "stock.jsonl", exit=None, chat=True, counterexample=True,
    ),
)  # fmt: skip
