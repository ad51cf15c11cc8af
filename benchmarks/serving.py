"""Serving with vLLM, with and without LayerSkip: throughput and latency against clients and against request rate.

    .venv-vllm/bin/python -m benchmarks.serving --model DIR --prompts FILE [--clients 1 4 8] [--rates 1 2 4 8]

Two OpenAI servers of one model are up at the same time, and take turns at each point, so both see the same machine.
With ``--clients N``, N clients send one request after the other; with ``--rates`` requests come at random (Poisson)
times, whether or not the earlier ones are answered. ``--seed`` draws the times, the same for all. The time a token is
what an answer took after its first token, divided by the other tokens. Texts are compared: greedy ones must be equal in
fp32, and are counted in bf16, where vLLM itself rounds differently for every batch. DIR is what
``layerskip export --whole`` writes; FILE has one JSON object with "prompt" a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from layerskip import _ends
from layerskip._files import write_atomically
from layerskip.cli.arguments import read_prompts

WAYS = {"vLLM": [], "vLLM + LayerSkip": ["--load-format", "layerskip"]}
COUNTERS = ("num_draft_tokens_total", "num_accepted_tokens_total")
TIMES = ("first token", "token", "whole answer")
"""Seconds of an answer."""
COLUMNS = ("way", "load", "tokens/s", "requests/s", *(f"{time} {point}" for time in TIMES for point in ("p50", "p90")),
           "accepted")  # fmt: skip


@dataclass
class Answer:
    """One request: its text and number of tokens, and seconds to the first token and to the last."""

    text: str
    tokens: int
    first: float
    whole: float

    @property
    def seconds(self) -> dict[str, float]:
        """By `TIMES`; an answer of one token has no time a token."""
        later = {"token": (self.whole - self.first) / (self.tokens - 1)} if self.tokens > 1 else {}
        return {"first token": self.first, **later, "whole answer": self.whole}


@dataclass
class Server:
    """A server that was started, and where it will answer."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def wait(self) -> None:
        """Return once it answers."""
        while not _answers(self.address):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(1)


@contextmanager
def serve(model: str, options: Sequence[str], log: Path) -> Iterator[Server]:
    """A server, which is stopped at the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--served-model-name", "served", *options], stdout=file, stderr=file)
    try:
        yield Server(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def metrics(address: str) -> dict[str, float]:
    """Sums of the server's counters of speculation, and its cache blocks."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found = dict.fromkeys(COUNTERS, 0.0)
    for line in lines:
        for name in COUNTERS:
            if line.startswith(f"vllm:spec_decode_{name}{{"):
                found[name] += float(line.split()[-1])
        if line.startswith("vllm:cache_config_info{"):
            found["cache_blocks"] = float(line.split('num_gpu_blocks="')[1].split('"')[0])
    return found


def memory(pid: int) -> float:
    """MiB of a server and its children; pages that processes share count once."""
    import psutil

    process = psutil.Process(pid)
    return sum(each.memory_full_info().pss for each in (process, *process.children(recursive=True))) / 2**20


async def ask(session: Any, address: str, prompt: str, tokens: int) -> Answer:
    body = {"model": "served", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    start, first, text, count = time.perf_counter(), 0.0, "", 0
    async with session.post(f"{address}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("error"):
                raise RuntimeError(event["error"])
            first = first or time.perf_counter() - start
            text += "".join(choice["text"] for choice in event["choices"])
            count = (event.get("usage") or {}).get("completion_tokens", count)
    return Answer(text, count, first, time.perf_counter() - start)


async def closed(session: Any, address: str, prompts: Sequence[str], tokens: int, clients: int) -> list[Answer]:
    """Answers in the prompts' order, from clients that ask one after the other."""
    waiting, answers = list(enumerate(prompts))[::-1], {}

    async def client() -> None:
        while waiting:
            index, prompt = waiting.pop()
            answers[index] = await ask(session, address, prompt, tokens)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [answers[index] for index in range(len(prompts))]


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the first request at which requests come: a Poisson process of a rate a second."""
    generator = random.Random(seed)
    return [0.0, *accumulate(generator.expovariate(rate) for _ in range(count - 1))]


async def opened(
    session: Any, address: str, prompts: Sequence[str], tokens: int, times: Sequence[float]
) -> list[Answer]:
    """Answers in the prompts' order; each is asked at its time, whether or not the earlier ones are answered."""
    start, tasks = time.perf_counter(), []
    for prompt, moment in zip(prompts, times, strict=True):
        await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(session, address, prompt, tokens)))
    return list(await asyncio.gather(*tasks))


def summary(answers: Sequence[Answer], seconds: float, before: dict[str, float], after: dict[str, float]) -> dict:
    """A run by the names of `COLUMNS`."""
    drafted, accepted = (after[name] - before[name] for name in COUNTERS)
    found: dict[str, Any] = {
        "tokens/s": sum(answer.tokens for answer in answers) / seconds,
        "requests/s": len(answers) / seconds,
        "accepted": accepted / drafted if drafted else None,
        "answers": [asdict(answer) for answer in answers],
    }
    for name in TIMES:
        times = [answer.seconds[name] for answer in answers if name in answer.seconds]
        found[f"{name} p50"], found[f"{name} p90"] = (quantile(times, share) for share in (0.5, 0.9))
    return found


def quantile(values: Sequence[float], share: float) -> float | None:
    """Between the two nearest of the values; None of no values."""
    if len(values) < 2:
        return values[0] if values else None
    place = share * (len(values) - 1)
    ordered, low = sorted(values), min(int(place), len(values) - 2)
    return ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])


async def run(args: argparse.Namespace, addresses: dict[str, str], prompts: Sequence[str]) -> list[dict]:
    """A line a way and load; the ways of one load take turns."""
    import aiohttp

    lines: list[dict] = []
    loads: list[tuple[str, float, Any, Any]] = [("clients", count, closed, count) for count in args.clients]
    loads += [("rate", rate, opened, arrivals(len(prompts), rate, args.seed)) for rate in args.rates]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for address in addresses.values():
            await closed(session, address, prompts[:8], args.max_tokens, 8)  # the first rounds compile and allocate
        for kind, size, drive, load in loads:
            tried: dict[str, list[dict]] = {way: [] for way in addresses}
            for _ in range(args.repeat):
                for way, address in addresses.items():
                    before, start = metrics(address), time.perf_counter()
                    answers = await drive(session, address, prompts, args.max_tokens, load)
                    tried[way].append(summary(answers, time.perf_counter() - start, before, metrics(address)))
            for way, of_way in tried.items():
                middle = sorted(of_way, key=lambda line: line["whole answer p50"])[len(of_way) // 2]
                lines.append({"way": way, "kind": kind, "size": size, "load": f"{size:g} {kind}", **middle})
                print(row(lines[-1]), flush=True)
    return lines


def row(line: dict) -> str:
    cells = [line[name] for name in COLUMNS]
    texts = ["-" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
    return f"| {' | '.join(texts)} |"


PANELS = (("clients", ("tokens/s",)), ("rate", ("tokens/s",)),
          *(("rate", (f"{name} p50", f"{name} p90")) for name in TIMES))  # fmt: skip


def picture(lines: Sequence[dict], path: Path) -> None:
    """Throughput over clients and over the request rate, and the latencies over the rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in PANELS if any(line["kind"] == panel[0] for line in lines)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), squeeze=False)
    for axis, (kind, values) in zip(axes[0], panels, strict=True):
        for value, (way, color) in product(values, zip(WAYS, ("C0", "C1"), strict=True)):
            points = [(line["size"], line[value]) for line in lines if line["kind"] == kind and line["way"] == way]
            label = f"{way}, {value[-3:]}" if len(values) > 1 else way
            axis.plot(
                *zip(*points, strict=True), "--" if value.endswith("p90") else "-", c=color, marker="o", label=label
            )
        axis.set_xlabel("clients" if kind == "clients" else "requests/s")
        axis.set_ylabel(values[0] if len(values) == 1 else f"{values[0][:-4]}, s")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def different(lines: Sequence[dict]) -> dict[str, int]:
    """By load, how many texts are not those of vLLM alone."""
    loads: dict[str, list[list[str]]] = {}
    for line in lines:
        loads.setdefault(line["load"], []).append([answer["text"] for answer in line["answers"]])
    return {load: sum(one != other for one, other in zip(*texts, strict=True)) for load, texts in loads.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", default="samples")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--rates", type=float, nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0, help="of the times at which requests come")
    parser.add_argument("--repeat", type=int, default=3, help="the run with the middle latency counts")
    parser.add_argument("--server-options", default="", help="for both servers, as one string")
    parser.add_argument("--layerskip-options", default="", help="for the server with LayerSkip, as one string")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/serving"), help="without .json and .png"
    )
    _ends.declare(parser)
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the servers end, too
    prompts = [prompt.text for prompt in read_prompts(args.prompts, args.limit)]
    common = args.server_options.split()
    ways = {way: [*options, *common] for way, options in WAYS.items()}
    ways["vLLM + LayerSkip"] += args.layerskip_options.split()
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(args.model, ways["vLLM"], Path(folder, "plain")) as plain,
        serve(args.model, ways["vLLM + LayerSkip"], Path(folder, "layerskip")) as ours,
    ):
        servers = dict(zip(WAYS, (plain, ours), strict=True))
        for server in servers.values():
            server.wait()
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        lines = asyncio.run(run(args, {way: server.address for way, server in servers.items()}, prompts))
        space = {way: memory(server.process.pid) for way, server in servers.items()}
        blocks = {way: metrics(server.address)["cache_blocks"] for way, server in servers.items()}
    texts = different(lines)
    print(f"MiB: {space}; cache blocks: {blocks}; texts that differ: {texts}")
    result = {"command": sys.argv[1:], "cores": os.cpu_count(), "memory_mib": space, "cache_blocks": blocks}
    for line in lines:  # their texts are long, and were compared
        line["answers"] = [{name: answer[name] for name in ("tokens", "first", "whole")} for answer in line["answers"]]
    result |= {"texts_that_differ": texts, "lines": lines}
    write_atomically(args.output.with_suffix(".json"), json.dumps(result, indent=1).encode())
    picture(lines, args.output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(_ends.module("benchmarks.serving", main))
