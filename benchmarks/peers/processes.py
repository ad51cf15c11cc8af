"""The peers' environments, and the processes in which they decode."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

ENVIRONMENTS = Path(".venv-peers")
REQUIREMENTS = {"llama.cpp": ["llama-cpp-python"], "openvino": ["openvino-genai"]}
"""What is installed for an engine; transformers is in this environment, vLLM in one that `make` has a rule for."""
VLLM = Path(".venv-vllm")
WORKER = Path(__file__).with_name("worker.py")
LIMIT = 600.0  # seconds that loading, or one answer, may take


class MissingPeerError(Exception):
    """A peer cannot be measured; the message says why."""


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
