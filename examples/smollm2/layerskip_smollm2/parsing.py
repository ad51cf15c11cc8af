"""Semantic parsing: a spoken command to its intent and slots, ``[IN:HassLightSet [SL:area kitchen ] … ]``.

The commands are drawn from the English templates of ``home-assistant-intents`` as ``hassil`` parses them; a draw is
kept only where ``hassil.recognize`` gives its intent back, and its slots are the target.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterator
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layerskip._files import write_atomically
from layerskip.training.data import Example

from . import home
from ._splits import stable_fraction

SPLITS = ("train", "test", "test_templates")

TEMPLATE_SHARE = 0.06  # of the templates left out of training whole
UTTERANCE_SHARE = 0.04  # of the utterances of the other templates
_INTENT_BUDGET = 560  # draws an intent, shared among its templates, so that timers don't drown the rest
_DRAWS = (7, 40)  # fewest and most draws a template


def load(split: str) -> list[Example]:
    """Examples of ``split``, drawn once and then read from the cache.

    ``test`` holds unseen utterances of templates that training draws from, ``test_templates`` draws of templates that
    training never sees. ``group`` is the template.
    """
    from layerskip_kernels.files import cache_directory  # which takes torch; the splits are known without it

    path = cache_directory() / "data" / f"parsing-{_fingerprint()}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps([{**asdict(e), "split": s} for s, e in _draw_all()]).encode())
    records = json.loads(path.read_text(encoding="utf-8"))
    return [Example(r["prompt"], r["completion"], r["group"]) for r in records if r["split"] == split]


def prompt(utterance: str) -> str:
    """The text that the model reads for a command."""
    return f"Command: {utterance}\nParse:"


def _fingerprint() -> str:
    """Changes with whatever the draw depends on."""
    if not (find_spec("hassil") and find_spec("home_assistant_intents")):
        raise ModuleNotFoundError(
            "parsing needs the packages hassil and home-assistant-intents: pip install hassil home-assistant-intents"
        )
    sources = b"".join(Path(path).read_bytes() for path in (__file__, str(home.__file__)))
    versions = f"{version('home-assistant-intents')} {version('hassil')}"
    return hashlib.sha256(sources + versions.encode()).hexdigest()[:16]


def _home_intents() -> Any:
    """The English intents with the slots filled by `home`, and without the room that a satellite would supply."""
    from hassil import Intents
    from home_assistant_intents import get_intents

    data: Any = get_intents("en")
    for intent in data["intents"].values():
        for block in intent["data"]:
            block.get("requires_context", {}).pop("area", None)
    lists = data["lists"]
    lists["area"] = {"values": list(home.AREAS)}
    lists["floor"] = {"values": list(home.FLOORS)}
    lists["name"] = {
        "values": [
            {"in": name, "out": name, "context": {"domain": domain}}
            for domain, names in home.NAMES.items()
            for name in names
        ]
    }
    for name, texts in home.FREE_TEXTS.items():
        lists[name] = {"values": list(texts)}
    return Intents.from_dict(data)


def _draw_all(only: Collection[str] = ()) -> Iterator[tuple[str, Example]]:
    """Examples (of the intents ``only``, if given) with their splits; an utterance stays with its first template."""
    intents = _home_intents()
    seen: set[str] = set()
    for intent in intents.intents.values():
        if only and intent.name not in only:
            continue
        total = sum(len(block.sentences) for block in intent.data)
        draws = min(max(_INTENT_BUDGET // total, _DRAWS[0]), _DRAWS[1])
        for block in intent.data:
            for sentence in block.sentences:
                group = f"{intent.name}: {sentence.text}"
                for utterance in _utterances(sentence, block, intents, draws, group):
                    if utterance in seen:
                        continue
                    seen.add(utterance)
                    completion = _target(utterance, intent.name, intents)
                    if completion is not None:
                        yield _split(group, utterance), Example(prompt(utterance), completion, group)


def _split(template: str, utterance: str) -> str:
    if stable_fraction(template) < TEMPLATE_SHARE:
        return "test_templates"
    return "test" if stable_fraction(utterance) < UTTERANCE_SHARE else "train"


def _utterances(sentence: Any, block: Any, intents: Any, draws: int, seed: str) -> list[str]:
    """Up to ``draws`` distinct random expansions of a template, in the order drawn."""
    rng = random.Random(seed)
    lists = {**intents.slot_lists, **block.slot_lists}
    domains = block.requires_context.get("domain")
    drawn: dict[str, None] = {}
    for _ in range(2 * draws):
        text = "".join(_walk(sentence.expression, rng, lists, intents.expansion_rules, domains))
        drawn[" ".join(text.split())] = None
        if len(drawn) == draws:
            break
    return list(drawn)


def _walk(node: Any, rng: random.Random, lists: dict[str, Any], rules: dict[str, Any], domains: Any) -> Iterator[str]:
    """One random path through an expression; `hassil.sample` would enumerate all of them, millions for one template."""
    from hassil import expression as ex

    if isinstance(node, ex.TextChunk):
        yield node.original_text
    elif isinstance(node, ex.Alternative):
        yield from _walk(rng.choice(node.items), rng, lists, rules, domains)
    elif isinstance(node, ex.Permutation):
        for item in rng.sample(node.items, len(node.items)):
            yield from _walk(item, rng, lists, rules, domains)
            yield " "
    elif isinstance(node, ex.Group):
        for item in node.items:
            yield from _walk(item, rng, lists, rules, domains)
    elif isinstance(node, ex.RuleReference):
        yield from _walk(rules[node.rule_name].expression, rng, lists, rules, domains)
    elif isinstance(node, ex.ListReference):
        yield from _walk_list(lists[node.list_name], rng, lists, rules, domains)
    else:
        raise TypeError(f"unexpected node in a template: {node!r}")


def _walk_list(
    values: Any, rng: random.Random, lists: dict[str, Any], rules: dict[str, Any], domains: Any
) -> Iterator[str]:
    from hassil.intents import RangeSlotList, TextSlotList

    if isinstance(values, RangeSlotList):
        yield str(rng.randrange(values.start, values.stop + 1, values.step))
    elif isinstance(values, TextSlotList):
        fitting = [v for v in values.values if not (domains and v.context) or v.context["domain"] in domains]
        yield from _walk(rng.choice(fitting).text_in, rng, lists, rules, domains)
    else:
        raise TypeError(f"a template refers to a list without values: {values!r}")


def _target(utterance: str, intent: str, intents: Any) -> str | None:
    """The linearised parse, slots by name; None where the recognizer hears another intent, or none."""
    from hassil import recognize

    result = recognize(utterance, intents)
    if result is None or result.intent.name != intent:
        return None
    slots = "".join(f" [SL:{name} {_spell(result.entities[name].value)} ]" for name in sorted(result.entities))
    return f" [IN:{intent}{slots} ]"


def _spell(value: Any) -> str:
    """Ranges come back as floats: 7.0 is written 7."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
