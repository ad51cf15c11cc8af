"""Show what bench and exits measured as one HTML page: the source of every token, plots, tables."""

from __future__ import annotations

import argparse
import json
import re
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .._files import check_output, write_atomically
from .._imports import need
from . import rendering

_TYPES = {"a text": str, "true or false": bool, "a whole number": int, "an object": dict, "a list": list}
# A new token's text, kind, tooltip, and the text of the draft token that it replaced.
Origin = namedtuple("Origin", "text kind tip rejected", defaults=[""])


def run(args: argparse.Namespace, console: Console) -> int:
    """Read the files, write the page."""
    check_output(args.output, args.overwrite, args.files)
    write_atomically(args.output, page([read(path) for path in args.files]).encode())
    console.print(f"wrote {args.output}", highlight=False, soft_wrap=True)
    return 0


def page(files: Sequence[Mapping[str, Any]]) -> str:
    """HTML that loads nothing and runs no script, of files as `read` returns them."""
    jinja2 = need("jinja2", "layerskip report")
    loader, undefined = jinja2.FileSystemLoader(rendering.DATA), jinja2.StrictUndefined
    environment = jinja2.Environment(loader=loader, undefined=undefined, autoescape=True, trim_blocks=True)
    with rendering.panels() as panels:
        return str(environment.get_template("report.html").render(files=files, plots=rendering, panels=panels))


def read(path: Path) -> dict[str, Any]:
    """The checked JSON of a file, with its "name" and "kind"; ValueError that names the file if it is not right."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    for kind, shape in json.loads((rendering.DATA / "report_shapes.json").read_text()).items():
        if isinstance(content, dict) and next(iter(shape)) in content:
            try:
                check(content, shape)
                check_together(content)
            except ValueError as error:
                raise ValueError(f"{path} looks like a file of layerskip {kind}, but {error}") from error
            return {**content, "name": path.name, "kind": kind}
    raise ValueError(f"{path} was written neither by layerskip bench nor by layerskip exits")


def check(value: Any, shape: Any, where: str = "it") -> None:
    """Raise ValueError unless `value` has a shape: words, a list of one shape, a pair, or an object of shapes by key.

    The key "*" stands for every key; a value whose key ends with "?" may be missing or null.
    """
    words: str = "an object" if isinstance(shape, dict) else "a list" if isinstance(shape, list) else shape
    right = isinstance(value, _TYPES.get(words, (int, float))) and isinstance(value, bool) == (words == "true or false")
    if right and "number" in words:
        right = (0 if "above 0" in words else -1e300) < value < 1e300
    elif right and words == "a list" and len(shape) == 2:
        words, right = "a list of 2", len(value) == 2
    if not right:
        raise ValueError(f"{where} must be {words}, got {str(value)[:40]!r}")
    for index, one in enumerate(value if words.startswith("a list") else ()):
        check(one, shape[index % len(shape)], f"{where}[{index}]")
    for key, inner in shape.items() if words == "an object" else ():
        for name in value if key[0] == "*" else [key.removesuffix("?")]:
            if key[-1] != "?" and name not in value:
                raise ValueError(f"{where} has no {name!r}")
            if key[-1] != "?" or value.get(name) is not None:
                check(value[name], inner, f"{where}.{name}".removeprefix("it."))


def check_together(content: Mapping[str, Any]) -> None:
    """Raise ValueError if values do not fit together; add to a run its "origins", to a sweep its speeds as "grid"."""
    prompts = len(content.get("prompts") or ())
    for name, runs in content.get("runs", {}).items():
        for where, run in ((f"runs.{name}[{index}]", run) for index, run in enumerate(runs)):
            if run["tokens"] > 0 >= run["seconds"]:
                raise ValueError(f"{where} has {run['tokens']} tokens in {run['seconds']} seconds")
            run["told"] = run.get("told") or {"pieces": [], "rounds": []}
            run["origins"] = list(origins(run["told"], where)) if run["told"]["pieces"] else []
            if (run["origins"] or prompts) and not 0 <= run["prompt"] < prompts:
                raise ValueError(f"{where} is of prompt {run['prompt']}, and there are {prompts}")
    for index, task in enumerate(content.get("sweep", [])):
        task["grid"] = {}
        for name, rate in (task["fixed"] or {"": 0}).items():
            if not (found := re.fullmatch(r"E=(\d+), K=(\d+)", name)):
                raise ValueError(f"sweep[{index}].fixed has {[*task['fixed']]}, expected names such as 'E=4, K=8'")
            task["grid"].setdefault(int(found[1]), {})[int(found[2])] = rate
    if len(ways := {tuple(batch["tokens_per_second"]) for batch in content.get("throughput", [])}) > 1:
        raise ValueError(f"throughput has batches of different ways: {sorted(ways)}")


def origins(told: Mapping[str, Any], where: str) -> Iterator[Origin]:
    """Where each of the new tokens came from; ValueError, for the run `where`, if the rounds do not give them."""
    pieces, given = iter(told["pieces"]), sum(one["emitted"] for one in told["rounds"])
    if given != len(told["pieces"]) - 1:
        count = len(told["pieces"])
        raise ValueError(f"{where} has {count} new tokens, of which its rounds give {given}, not all but 1")
    yield Origin(next(pieces), "own", "the first token: from the prompt, before the first round")
    for number, one in enumerate(told["rounds"], start=1):
        drafts, accepted, emitted, layer = one["drafts"], one["accepted"], one["emitted"], one.get("exit_layer")
        if not (0 <= accepted <= len(drafts) and emitted - accepted in (0, 1)):
            counts = f"{accepted} accepted of {len(drafts)} drafts and emitted {emitted}"
            raise ValueError(f"{where}.told.rounds[{number - 1}] has {counts}")
        kind = one["source"] if one["source"] in ("exit", "ngram") else "other"
        how = f"drafted after layer {layer}" if layer else f"drafted by {one['source']}"
        for place in range(1, accepted + 1):
            yield Origin(next(pieces), kind, f"round {number}: {how}, token {place} of {len(drafts)}, accepted")
        if emitted > accepted:
            wrong = drafts[accepted : accepted + 1]
            after = f"after accepting {accepted} of {len(drafts)}" if drafts else "nothing was drafted"
            tip = f"in place of “{wrong[0]}”, {how}, token {accepted + 1} of {len(drafts)}" if wrong else after
            tip = f"round {number}: the model's own, {tip}".replace("\n", "↵")
            yield Origin(next(pieces), "fix" if wrong else "own", tip, *wrong)
