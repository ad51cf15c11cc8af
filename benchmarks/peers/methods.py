"""The methods to compare: an engine and its settings for each."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants
from torch import Tensor

from layerskip import registry
from layerskip.cli.export import first_layers
from layerskip.models import adapt, load, save
from layerskip.models.checkpoints.gguf import gguf_name

from ..harness import MissingPeerError

OURS = "layerskip"
LOOKUP = 8  # tokens that the peers' prompt lookup drafts


@dataclass(frozen=True)
class Task:
    """Prompts, and the model that was trained for early exit on such: E and K are those that serve it best."""

    prompts: str
    model: str
    exit_layer: int
    num_speculations: int


TASKS = {
    "parsing": Task("parsing:test", "smollm2-layerskip", 4, 8),
    "coding": Task("coding:humaneval", "smollm2-layerskip-coding", 2, 3),
    "summarization": Task("summarization:test", "smollm2-layerskip-summarization", 2, 2),
}


@dataclass(frozen=True)
class Method:
    """A way of decoding. ``plain`` ones draft nothing; the weights' format is that of the engine's own name."""

    engine: str
    name: str
    weights: str
    settings: dict[str, Any] = field(default_factory=dict)
    plain: bool = False

    def __str__(self) -> str:
        return f"{self.engine} {self.weights}, {self.name}"

    @property
    def is_baseline(self) -> bool:
        """Whether the others are compared with it."""
        return self.engine == OURS and self.plain and self.weights == "bf16"


def methods(task: Task, engines: Sequence[str], forms: Forms, threads: int, length: int) -> Iterator[Method]:
    """The ways of some engines for one task; the baseline is the first."""
    yield from _ours(task, forms, {"threads": threads, "max_seq_len": length})
    if "transformers" in engines:
        yield from _transformers(task, {"model": str(forms.directory()), "threads": threads})
    if "llama.cpp" in engines:
        yield from _llama(task, forms, {"threads": threads, "length": length})
    if "openvino" in engines:
        for kind in ("f16", "q8_0", "q4_0"):
            vino = {"model": str(forms.gguf(kind)), "threads": threads}
            yield Method("openvino", "generate", kind, vino, plain=True)
            yield Method("openvino", "prompt lookup", kind, {**vino, "lookup": LOOKUP})
    if "vllm" in engines:
        yield from _vllm(task, {"model": str(forms.directory()), "threads": threads, "length": length})


def _ours(task: Task, forms: Forms, common: dict[str, Any]) -> Iterator[Method]:
    drafts = {
        "exit_layer": task.exit_layer, "num_speculations": task.num_speculations, "draft_head": task.model,
        "strategy": "self_speculative",
    }  # fmt: skip
    for weights in ("bf16", "int8", "int4"):
        own = {**common, "model": str(forms.directory() if weights == "bf16" else forms.packed(weights))}
        yield Method(OURS, "autoregressive", weights, {**own, "strategy": "autoregressive"}, plain=True)
        yield Method(OURS, "self-speculative", weights, {**own, **drafts})
        free = {**own, **drafts, "draft_source": "auto", "num_speculations": "auto"}
        yield Method(OURS, "self-speculative, n-grams or the exit", weights, free)


def _transformers(task: Task, common: dict[str, Any]) -> Iterator[Method]:
    yield Method("transformers", "generate", "bf16", common, plain=True)
    yield Method("transformers", "static cache, torch.compile", "bf16", {**common, "compiled": True}, plain=True)
    exits = {"assistant_early_exit": task.exit_layer, "num_assistant_tokens": task.num_speculations}
    yield Method("transformers", "assistant_early_exit", "bf16", {**common, **exits})
    yield Method("transformers", "prompt_lookup_num_tokens", "bf16", {**common, "prompt_lookup_num_tokens": LOOKUP})


def _llama(task: Task, forms: Forms, common: dict[str, Any]) -> Iterator[Method]:
    for kind in ("bf16", "q8_0", "q4_0", "q4_1"):
        own = {**common, "model": str(forms.gguf(kind))}
        yield Method("llama.cpp", "generate", kind, own, plain=True)
        yield Method("llama.cpp", "prompt lookup", kind, {**own, "drafted": LOOKUP})
        first = {"draft": str(forms.gguf(kind, task.exit_layer)), "drafted": task.num_speculations}
        yield Method("llama.cpp", "first layers as draft model", kind, {**own, **first})


def _vllm(task: Task, common: dict[str, Any]) -> Iterator[Method]:
    yield Method("vllm", "generate", "bf16", common, plain=True)
    lookup = {"method": "ngram", "num_speculative_tokens": LOOKUP, "prompt_lookup_max": 3}
    yield Method("vllm", "n-gram speculation", "bf16", {**common, "speculative_config": lookup})
    exits = {
        "exit_layer": task.exit_layer, "num_speculations": task.num_speculations,
        "draft_head": str(registry.draft_head(task.model)),
    }  # fmt: skip
    ours = {"load_format": "layerskip", "model_loader_extra_config": exits}
    yield Method("vllm", "the layerskip plugin", "bf16", {**common, **ours})


TYPES = ("bf16", "f16", "q8_0", "q4_0", "q4_1")


class Forms:
    """A model in every form, each written when it is first asked for, under a name that has a digest of its weights.

    Parameters
    ----------
    name : str
        A model of Llama's architecture.
    folder : Path
    like : Path
        A GGUF of the same shape, whose tokenizer and settings the files get.
    """

    def __init__(self, name: str, folder: Path, like: Path) -> None:
        self._model, self.tokenizer = load(name, torch.bfloat16)
        digest = hashlib.sha256(like.read_bytes())
        for weight in self._model.state_dict().values():
            digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
        self._stem, self._like = folder / f"{name}-{digest.hexdigest()[:12]}", like

    def directory(self) -> Path:
        """As transformers reads it, in bf16."""
        if not self._stem.exists():
            with _unfinished(self._stem) as folder:
                self._model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
        return self._stem

    def packed(self, weights: str) -> Path:
        """As `layerskip quantize` writes it; always anew, as weights are packed now."""
        target = Path(f"{self._stem}.{weights}")
        shutil.rmtree(target, ignore_errors=True)
        with _unfinished(target) as folder:
            save(adapt(self._model).quantize(weights), folder, self.tokenizer)
        return target

    def gguf(self, kind: str, layers: int | None = None) -> Path:
        """As a GGUF, whole or of the first layers with norm and head; its matrices have one of `TYPES`.

        Four-bit ones have embedding and head in Q8_0, as is usual.
        """
        name = f"{kind}.gguf" if layers is None else f"first-{layers}.{kind}.gguf"
        target = Path(f"{self._stem}.{name}")
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            model = self._model if layers is None else first_layers(self._model, layers)
            write(model, kind, GGUFReader(str(self._like)), unfinished)
            unfinished.rename(target)
        return target


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A directory to fill, which then gets its name."""
    folder = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    folder.rename(target)


def write(model: Any, kind: str, like: GGUFReader, target: Path) -> None:
    """Write the GGUF of a transformers model."""
    writer = GGUFWriter(str(target), "llama")
    _copy_settings(like, writer)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.upper()}"])
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.named_parameters():
        matrix = weight.detach().float()
        if (found := re.search(r"self_attn\.(q_proj|k_proj)\.weight$", name)) is not None:
            matrix = _side_by_side(matrix, heads[found[1]])
        own = "q8_0" if kind.startswith("q4") and ("embed" in name or "lm_head" in name) else kind
        made = GGMLQuantizationType[own.upper()] if matrix.dim() == 2 else GGMLQuantizationType.F32
        data = quants.quantize(np.ascontiguousarray(matrix.numpy()), made)
        writer.add_tensor(gguf_name(name), data, raw_dtype=made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Rows (i, i + C/2) of a head, which rotate together, next to each other, as llama.cpp keeps them."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _copy_settings(like: GGUFReader, writer: GGUFWriter) -> None:
    """All that is not about tensors' types or the number of layers."""
    own = ("general.architecture", "general.file_type", "llama.block_count")
    for entry in like.fields.values():
        if entry.name.startswith("GGUF.") or entry.name in own:
            continue
        kind = entry.types[0]
        sub_type = entry.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(entry.name, entry.contents(), kind, sub_type=sub_type)


ENVIRONMENTS = Path(".venv-peers")
REQUIREMENTS = {"llama.cpp": ["llama-cpp-python"], "openvino": ["openvino-genai"]}
"""Packages to install for each engine; transformers is in this environment, vLLM in that of `make test-vllm`."""
VLLM = Path(".venv-vllm")
WORKER = Path(__file__).with_name("worker.py")
LIMIT = 600.0  # seconds that loading, or one answer, may take


def install(engine: str) -> None:
    """Make an engine's environment, and install it there; llama-cpp-python is compiled for this machine."""
    folder = ENVIRONMENTS / engine
    try:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", *REQUIREMENTS[engine]], check=True)
    except BaseException:  # what is there counts as installed
        shutil.rmtree(folder, ignore_errors=True)
        raise


def environment(engine: str) -> Path | None:
    """Where an engine is installed; None is the environment of this process."""
    if engine == "vllm":
        folder, command = VLLM, f"make {VLLM}/.built"
    elif engine in REQUIREMENTS:
        folder, command = ENVIRONMENTS / engine, f"python -m benchmarks.peers --install {engine}"
    else:
        return None
    if not (folder / "bin/python").exists():
        raise MissingPeerError(f"it is not installed: {command}")
    return folder


class Worker:
    """A process that has loaded a model, and decodes when it is asked to.

    Parameters
    ----------
    engine : str
        A name of `worker.ENGINES`.
    settings : dict

    Raises
    ------
    MissingPeerError
        If the engine is not installed, or cannot load the model.
    """

    def __init__(self, engine: str, settings: dict[str, Any]) -> None:
        folder = environment(engine)
        python = sys.executable if folder is None else str(folder / "bin/python")
        variables = dict(os.environ)
        if engine == "vllm":  # it warns that drafts are slow without
            variables["LD_PRELOAD"] = str(VLLM.absolute() / "lib/libiomp5.so")
        command = [python, str(WORKER), engine, json.dumps(settings)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=variables,
        )  # fmt: skip
        self.ready = self._answer()

    def decode(self, ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """Greedy continuation of a prompt, see `worker`; MissingPeerError if the process ends instead."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which its answer will say
            print(json.dumps({"ids": list(ids), "new_tokens": new_tokens}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = Timer(LIMIT, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            ended = self._process.wait()
            self._errors.seek(0)
            said = [line for line in self._errors.read().splitlines() if line.strip()]
            raise MissingPeerError(f"it ended with {ended}: {said[-1] if said else 'no message'}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
