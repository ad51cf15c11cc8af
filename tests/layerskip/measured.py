"""Files of `layerskip bench` and `layerskip exits`, as they measure a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import save_tiny

from layerskip.cli import main

EVIL = "<script>alert('w5')</script> & \"quoted\""
PROMPTS = [{"prompt": "w5 w8 w13 w5 w8", "task": "counting"}, {"prompt": EVIL, "task": "<b>prose</b>"}]


def measure(folder: Path) -> None:
    """Write bench.json, auto.json, sweep.json and exits.json; one prompt is a script."""
    model = str(save_tiny(folder / "model", tie_word_embeddings=False))
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    common = ["--model", model, "--dtype", "float32", "--prompts", str(folder / "p.jsonl"), "--threads", "1"]
    ways = [*common, "--only-ours", "--exit-layer", "2", "--max-new-tokens"]
    output = {name: str(folder / name) for name in ("bench", "auto", "sweep", "exits")}
    assert main(["bench", *ways, "24", "--batch-sizes", "1", "2", "--output", output["bench"]]) == 0
    assert main(["bench", *ways, "64", "--draft-source", "auto", "--output", output["auto"]]) == 0
    assert main(["bench", *ways, "6", "--sweep", "--limit", "1", "--output", output["sweep"]]) == 0
    assert main(["exits", *common, "--max-new-tokens", "24", "--output", output["exits"]]) == 0
