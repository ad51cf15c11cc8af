"""The part of the page that shows a file of `layerskip bench`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..ways import AUTOREGRESSIVE, SELF_SPECULATIVE
from . import charts, tokens
from .markup import Html, join, table, tag

SHOWN = 6  # prompts; the others are folded away
_TAIL = 280  # characters of a prompt that are shown before its continuation

Content = Mapping[str, Any]


def section(content: Content, number: int) -> Html:
    """All of it."""
    runs = content["runs"].get(SELF_SPECULATIVE, [])
    speeds = {name: one["tokens_per_second"] for name, one in content["summary"].items() if one is not None}
    figures = [
        charts.bars("Speed", "after the first token, median over the prompts", speeds, "tokens/s") if speeds else None,
        charts.acceptance(runs),
        charts.tokens_a_round(runs),
        charts.roofline(content),
        charts.batches(content["throughput"]) if content["throughput"] else None,
    ]
    return join([
        tiles(content),
        notices(content),
        texts(content, number),
        tag("h3", "What was measured"),
        charts.grid(figures),
        swept(content["sweep"]),
        tag("h3", "Tables"),
        tables(content),
    ])  # fmt: skip


def tiles(content: Content) -> Html:
    """The figures that one looks for first."""
    plain, drafted = (content["summary"].get(name) for name in (AUTOREGRESSIVE, SELF_SPECULATIVE))
    facts = []
    if drafted is not None:
        facts += [
            (f"{drafted['speedup_of_means']:.2f}×", "as fast as decoding autoregressively"),
            (f"{drafted['tokens_per_second']:.0f}", "tokens/s, self-speculative"),
            (f"{drafted['acceptance_rate']:.0%}", "of the drafts accepted"),
        ]
    if plain is not None:
        facts.insert(2, (f"{plain['tokens_per_second']:.0f}", "tokens/s, autoregressive"))
    facts.append((f"{content['read_gigabytes_per_second']:.0f} GB/s", "the memory's read speed meanwhile"))
    same = content["identical"]
    facts.append(("✓" if same else "✗", "identical tokens both ways" if same else "the tokens differ"))
    shown = [tag("div", tag("dt", words), tag("dd", value)) for value, words in facts]
    return tag("dl", *shown, class_="tiles")


def notices(content: Content) -> Html:
    """What a reader has to know before the figures."""
    told = []
    if not content["identical"]:
        told.append("Self-speculative tokens differ from the autoregressive ones: no speedup counts.")
    if not content.get("complete", True):
        told.append("The measurement was interrupted; this is what there was.")
    told += [f"Prompt {one['prompt'] + 1} was skipped: {one['reason']}" for one in content["skipped"]]
    return join(tag("p", "⚠ ", line, class_="notice", role="note") for line in told)


def texts(content: Content, number: int) -> Html:
    """Every prompt's continuation, coloured; the first run of each."""
    first = {run["prompt"]: run for run in reversed(content["runs"].get(SELF_SPECULATIVE, []))}
    told = {prompt: run for prompt, run in sorted(first.items()) if run.get("told", {}).get("pieces")}
    if not told:
        return tag("p", "The file has no texts: an earlier version wrote it.", class_="notice")
    plain = {run["prompt"]: run for run in reversed(content["runs"].get(AUTOREGRESSIVE, []))}
    counts: Counter[str] = Counter()
    cards = []
    for prompt, run in told.items():
        kinds = Counter(one.kind for one in tokens.origins(run["told"]))
        counts += kinds
        cards.append(_card(prompt, content["prompts"][prompt], run, plain.get(prompt), kinds))
    rest = cards[SHOWN:]
    more = tag("details", tag("summary", f"{len(rest)} more"), *rest, class_="more") if rest else ""
    name = f"rejected-{number}"
    switch = [
        tag("input", type="checkbox", id=name, class_="switch"),
        tag("label", "show rejected drafts", tag("del", "like this"), for_=name),
    ]
    heading = tag("h3", "Where every token came from")
    return tag("section", heading, tokens.legend(counts), *switch, tag("div", *cards[:SHOWN], more, class_="cards"))


def _card(number: int, prompt: Content, run: Content, plain: Content | None, kinds: Counter[str]) -> Html:
    told, text = run["told"], prompt["text"]
    facts = [f"{len(told['pieces'])} tokens", f"{len(told['rounds'])} rounds"]
    if run["tokens"]:
        facts.append(f"{_rate(run):.0f} tokens/s")
    if run["tokens"] and plain is not None and plain["tokens"]:
        facts.append(f"{_rate(run) / _rate(plain):.2f}×")
    facts.append(f"{run['accepted']} of {run['drafted']} drafts accepted")
    head = tag("header", tag("h4", f"{number + 1}. {prompt['task'] or 'prompt'}"), tag("p", " · ".join(facts)))
    shown = tag("p", _tail(text), class_="prompt", translate="no")
    whole = tag("details", tag("summary", "whole prompt"), tag("p", text, class_="prompt")) if len(text) > _TAIL else ""
    rounds = tag("details", tag("summary", "round by round"), tokens.rounds_table(told["rounds"]))
    return tag("article", head, shown, tokens.coloured(told), tokens.shares(kinds), whole, rounds, class_="card")


def _tail(text: str) -> str:
    """The last lines of a text."""
    if len(text) <= _TAIL:
        return text
    tail = text[-_TAIL:]
    return "…\n" + (tail.partition("\n")[2] or tail).lstrip("\n")


def _rate(run: Content) -> float:
    return float(run["tokens"] / run["seconds"])


def swept(sweep: Sequence[Content]) -> Html:
    """Speed by E and K, as plots and as tables."""
    if not sweep:
        return Html()
    figures = charts.grid(map(charts.sweep, sweep))
    tables = join(map(_sweep_table, sweep))
    return join([tag("h3", "Which exit layer, and how many drafts"), figures, tables])


def _sweep_table(task: Content) -> Html:
    fixed = charts.of_fixed(task["fixed"])
    counts = sorted({count for row in fixed.values() for count in row})
    best = max(task["fixed"].values())
    rows = [
        [f"E={exit_layer}", *(_heat(row[count], best) if count in row else "" for count in counts)]
        for exit_layer, row in fixed.items()
    ]
    limit = f", threshold {task['draft_threshold']:g}" if task["draft_threshold"] else ""
    return table(["tokens/s", *(f"K={count}" for count in counts)], rows, f"{task['task'] or 'all prompts'}{limit}")


def _heat(value: float, best: float) -> Html:
    """A number, the darker the nearer it is to the best."""
    share = max(0.0, value / best - 0.4) / 0.6
    return tag("span", f"{value:.0f}", class_="heat best" if value == best else "heat", style=f"--heat:{share:.0%}")


def tables(content: Content) -> Html:
    """All figures."""
    shown = [_summary_table("all prompts", content["summary"])]
    if len(content["by_task"]) > 1:
        shown.append(_task_table(content["by_task"]))
    if content["throughput"]:
        names = list(content["throughput"][0]["tokens_per_second"])
        rows = [
            [batch["size"], *(f"{batch['tokens_per_second'][name]:.1f}" for name in names)]
            for batch in content["throughput"]
        ]
        shown.append(table(["sequences", *names], rows, "batches, tokens/s"))
    return join([*shown, settings(content)])


def _summary_table(caption: str, summary: Mapping[str, Content | None]) -> Html:
    head = (
        "", "tokens/s", "speedup, of means", "mean speedup", "first token", "drafts accepted", "MB/token", "GB/s",
        "of read speed",
    )  # fmt: skip
    return table(head, [_summary_row(name, one) for name, one in summary.items()], caption)


def _task_table(by_task: Mapping[str, Mapping[str, Content | None]]) -> Html:
    """A line for each task: the speed of every way, and what self-speculation gained."""
    names = list(next(iter(by_task.values())))
    rows = []
    for task, summary in by_task.items():
        known = [summary.get(name) for name in names]
        speeds = ["" if one is None else f"{one['tokens_per_second']:.1f}" for one in known]
        own = summary.get(SELF_SPECULATIVE)
        gained = ["", ""] if own is None else [f"{own['speedup_of_means']:.2f}×", f"{own['acceptance_rate']:.0%}"]
        rows.append([task or "other prompts", *speeds, *gained])
    return table(["", *names, "speedup, of means", "drafts accepted"], rows, "by task, tokens/s")


def _summary_row(name: str, one: Content | None) -> list[str]:
    if one is None:
        return [name, "no token after the first", *[""] * 7]
    known = bool(one["megabytes_per_token"])
    return [
        name,
        f"{one['tokens_per_second']:.1f}",
        f"{one['speedup_of_means']:.2f}×",
        f"{one['mean_speedup']:.2f}×",
        f"{one['milliseconds_to_first_token']:.0f} ms",
        f"{one['acceptance_rate']:.0%}" if name == SELF_SPECULATIVE else "",
        f"{one['megabytes_per_token']:.0f}" if known else "",
        f"{one['gigabytes_per_second']:.1f}" if known else "",
        f"{one['fraction_of_bandwidth']:.0%}" if known else "",
    ]


def settings(content: Content) -> Html:
    """What was set, and on which machine it ran."""
    told = [pairs("Settings", content["settings"].items())]
    if content.get("machine"):
        told.append(pairs("Machine and versions", content["machine"].items()))
    return tag("div", *told, class_="pair")


def pairs(caption: str, facts: Iterable[tuple[str, object]]) -> Html:
    """Names and values; what was not set is left out."""
    rows = [(name.replace("_", " "), value) for name, value in facts if value not in (None, "")]
    return table(("", ""), rows, caption)
