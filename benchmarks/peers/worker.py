"""One way of decoding in a process of its own: ``PYTHON worker.py ENGINE SETTINGS``, with the engine's own interpreter.

It needs nothing but the standard library and the engine. A line of JSON on standard input, ``{"ids", "new_tokens"}``,
is a greedy request; each is answered by a line on standard output: the new tokens, the seconds to the first of them and
to the last, how many came first, and the process's peak memory. The line before these says that the model is loaded.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from itertools import islice
from typing import Any

_VLLM_CACHE = 256 << 20  # bytes of keys and values

Tokens = list[int]


class _Groups:
    """What a ``generate`` with a streamer gives, group by group, with the time of each."""

    def __init__(self) -> None:
        self.groups: list[Tokens] = []
        self.arrivals: list[float] = []

    def put(self, value: Any) -> None:
        """The first call is the prompt."""
        self.groups.append(value.flatten().tolist())
        self.arrivals.append(time.perf_counter())

    def end(self) -> None:
        """Nothing follows."""


class Engine:
    """A loaded model, and how it decodes."""

    version = ""

    def decode(self, ids: Tokens, new_tokens: int) -> dict[str, Any]:
        """The answer to a request; of an engine that gives its tokens one group after the other."""
        started = time.perf_counter()
        tokens: Tokens = []
        arrivals: list[float] = []
        first = 0
        for group in self.groups(ids, new_tokens):
            arrivals.append(time.perf_counter())
            first = first or len(group)
            tokens += group
        return _answer(tokens, first, started, arrivals)

    def groups(self, ids: Tokens, new_tokens: int) -> Iterator[Tokens]:
        """The new tokens, as they arrive."""
        raise NotImplementedError


def _answer(tokens: Tokens, first: int, started: float, arrivals: list[float]) -> dict[str, Any]:
    return {
        "tokens": tokens, "first_tokens": first, "first": arrivals[0] - started, "seconds": arrivals[-1] - arrivals[0]
    }  # fmt: skip


class _Streamed(Engine):
    """An engine that calls a streamer."""

    def decode(self, ids: Tokens, new_tokens: int) -> dict[str, Any]:
        import torch

        streamer = _Groups()
        started = time.perf_counter()
        with torch.inference_mode():
            self.generate(torch.tensor([ids]), new_tokens, streamer)
        groups, arrivals = streamer.groups[1:], streamer.arrivals[1:]
        return _answer([token for group in groups for token in group], len(groups[0]), started, arrivals)

    def generate(self, ids: Any, new_tokens: int, streamer: _Groups) -> None:
        """Decode a prompt [1, N]."""
        raise NotImplementedError


class LayerSkip(_Streamed):
    """This library. Settings: model, threads, strategy, exit_layer, num_speculations, draft_head, …"""

    def __init__(self, model: str, threads: int, strategy: str, **options: Any) -> None:
        import torch

        from layerskip import DraftHead, SelfSpeculativeDecoder

        torch.set_num_threads(threads)
        head = options.pop("draft_head", None)
        if head is not None:
            options["draft_head"] = DraftHead.load(head)
        self._options = {name: options.pop(name) for name in ("draft_source",) if name in options}
        self._decoder = SelfSpeculativeDecoder.from_pretrained(model, **options)
        self._strategy, self.version = strategy, metadata.version("layerskip-kernels")

    def generate(self, ids: Any, new_tokens: int, streamer: _Groups) -> None:
        self._decoder.generate(ids, new_tokens, strategy=self._strategy, streamer=streamer, **self._options)


class Transformers(_Streamed):
    """transformers' ``generate``; further settings are its arguments. ``compiled`` takes a static cache."""

    def __init__(self, model: str, threads: int, compiled: bool = False, **options: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        count = options.pop("num_assistant_tokens", None)
        if count:
            config = self._model.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = count, "constant"
            config.assistant_confidence_threshold = 0.0
        if compiled:
            options["cache_implementation"] = "static"
            self._model.forward = torch.compile(self._model.forward, dynamic=True)
        self._options, self.version = options, metadata.version("transformers")

    def generate(self, ids: Any, new_tokens: int, streamer: _Groups) -> None:
        import torch

        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=streamer,
            **self._options,
        )  # fmt: skip


class LlamaCpp(Engine):
    """llama.cpp through llama-cpp-python. It drafts ``drafted`` tokens a round, with a ``draft`` model or looked up."""

    def __init__(self, model: str, threads: int, length: int, drafted: int = 0, draft: str | None = None) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        load = partial(Llama, n_ctx=length, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        source = None
        if draft is not None:
            source = _drafts_of(load(draft), drafted)
        elif drafted:
            source = LlamaPromptLookupDecoding(num_pred_tokens=drafted)
        self._model = load(model, draft_model=source, logits_all=bool(drafted))
        self.version = metadata.version("llama-cpp-python")

    def groups(self, ids: Tokens, new_tokens: int) -> Iterator[Tokens]:
        self._model.reset()
        for count, token in enumerate(self._model.generate(ids, temp=0.0), 1):
            yield [token]
            if count == new_tokens or token == self._model.token_eos():
                return


def _drafts_of(model: Any, count: int) -> Any:
    """A model's greedy continuations, as llama-cpp-python takes drafts; the model keeps what it has read."""
    import numpy as np
    from llama_cpp.llama_speculative import LlamaDraftModel

    class Drafts(LlamaDraftModel):  # type: ignore[misc]
        def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
            return np.fromiter(islice(model.generate(input_ids.tolist(), temp=0.0), count), np.intc)

    return Drafts()


class OpenVino(Engine):
    """OpenVINO GenAI, which reads GGUF files. ``lookup``: number of draft tokens of prompt lookup."""

    def __init__(self, model: str, threads: int, lookup: int = 0) -> None:
        import openvino_genai as genai

        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if lookup:
            options["prompt_lookup"] = True
        self._genai, self._lookup = genai, lookup
        self._model = genai.LLMPipeline(model, "CPU", **options)
        self.version = metadata.version("openvino-genai")

    def decode(self, ids: Tokens, new_tokens: int) -> dict[str, Any]:
        import numpy as np
        import openvino

        genai = self._genai
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = new_tokens, False
        if self._lookup:
            config.num_assistant_tokens, config.max_ngram_size = self._lookup, 3
        arrivals: list[float] = []

        class Watch(genai.StreamerBase):  # type: ignore[misc, name-defined]
            def write(self, token: Any) -> Any:
                arrivals.append(time.perf_counter())
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        rows = np.array([ids], dtype=np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(rows), openvino.Tensor(np.ones_like(rows)))
        started = time.perf_counter()
        result = self._model.generate(inputs, config, Watch())
        return _answer(list(result.tokens[0]), 1, started, arrivals)


class Vllm(Engine):
    """vLLM on the CPU, in this one process, without its cache of prompts. Further settings are those of its `LLM`."""

    def __init__(self, model: str, threads: int, length: int, **options: Any) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        import torch

        torch.set_num_threads(threads)  # before vLLM, which then refuses
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self._sampling = partial(
            vllm.SamplingParams, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self._engine = vllm.LLM(
            model, dtype="bfloat16", max_model_len=length, max_num_seqs=1, kv_cache_memory_bytes=_VLLM_CACHE,
            enable_prefix_caching=False, distributed_executor_backend="uni", **options,
        ).llm_engine  # fmt: skip
        self.version = metadata.version("vllm-cpu")

    def groups(self, ids: Tokens, new_tokens: int) -> Iterator[Tokens]:
        self._engine.add_request("0", {"prompt_token_ids": ids}, self._sampling(max_tokens=new_tokens))
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                yield list(output.outputs[0].token_ids)


ENGINES: dict[str, Callable[..., Engine]] = {
    "layerskip": LayerSkip, "transformers": Transformers, "llama.cpp": LlamaCpp, "openvino": OpenVino, "vllm": Vllm
}  # fmt: skip


def peak_mib() -> float:
    """Peak memory of this process; Linux adds the parent's to ``ru_maxrss`` after a fork."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def main() -> None:
    """Load, then answer until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints, from whatever language, is no answer
    engine, settings = sys.argv[1], json.loads(sys.argv[2])
    started = time.perf_counter()
    loaded = ENGINES[engine](**settings)
    print(json.dumps({"load": time.perf_counter() - started, "version": loaded.version}), file=out, flush=True)
    for line in sys.stdin:
        answer = loaded.decode(**json.loads(line))
        answer["peak_mib"] = peak_mib()
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
