"""What ``layerskip demo`` shows: three adapters in their tasks, and the stock model that they were trained on."""

from __future__ import annotations

from pathlib import Path

from layerskip.cli.demo import Exhibit

from .models import STOCK, TRAINED

_PROMPTS = Path(__file__).parent / "prompts"

EXHIBITS = (
    Exhibit(
        TRAINED, "LayerSkip for commands", 4, 8,
        "This is SmolLM2-135M with a LayerSkip adapter that comes with this package: trained on home-automation "
        "commands with an early-exit loss, so that its first layers can already predict. They draft with an int8 head "
        "of the 8192 most frequent tokens; the full model verifies all drafts of a round at once.",
        _PROMPTS / "commands.jsonl", TRAINED,
    ),
    Exhibit(
        f"{TRAINED}-summarization", "LayerSkip for summaries", 2, 2,
        "The same model with an adapter that was trained to summarize abstracts. Prose is harder to guess than "
        "commands: fewer layers draft, and fewer tokens.",
        _PROMPTS / "abstracts.jsonl", f"{TRAINED}-summarization",
    ),
    Exhibit(
        f"{TRAINED}-coding", "LayerSkip for Python", 2, 3,
        "The same model with an adapter whose early exits were trained on what its own full depth writes.",
        _PROMPTS / "functions.jsonl", f"{TRAINED}-coding",
    ),
    Exhibit(
        STOCK, "stock", 24, 3,
        "For comparison, stock SmolLM2, which was not trained to exit early, so its early exits are useless: layer 12 "
        "of 30 agrees with the last layer on about 4 % of its tokens, and even layer 24, which drafts here, on about "
        "40 % (layerskip exits --model smollm2). Few drafts are accepted, each costs most of a full pass, and the "
        "self-speculative side is SLOWER. Its tokens are the same even so.",
        _PROMPTS / "stock.jsonl",
    ),
)  # fmt: skip
