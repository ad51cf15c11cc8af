"""Print figures of the exits on a task, or the perplexity of a task with long texts, as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .. import _ends, devices, registry
from ..models import load
from .data import documents, load_task
from .exit_analysis import evaluate_exits, perplexity, spread


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m layerskip.training.evaluate``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-layerskip", help="as `layerskip.load` takes it")
    parser.add_argument("--task", default="parsing", help="with long texts, such as text: print the perplexity")
    parser.add_argument("--split", default="test")
    parser.add_argument("--exits", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--limit", type=int, help="use up to this many examples or windows of text, spread over all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--weights", help="quantize, as `layerskip.load` does: int8, int4, … or native")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: the first GPU if there is one")
    _ends.declare(parser)
    options = parser.parse_args(arguments)
    registry.check_model(options.model)
    long = hasattr(registry.get(registry.TASKS, options.task), "documents")
    texts: list[Any] = (documents if long else load_task)(options.task, options.split)
    device = devices.find(options.device)
    model, tokenizer = load(options.model, getattr(torch, options.dtype), options.weights)
    model.to(device)
    if long:
        print(json.dumps({"perplexity": perplexity(model, tokenizer, texts, limit=options.limit)}))
    else:
        print(json.dumps(vars(evaluate_exits(model, tokenizer, spread(texts, options.limit), options.exits))))


if __name__ == "__main__":
    sys.exit(_ends.module("layerskip.training.evaluate", main))
