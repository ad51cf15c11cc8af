"""A script in processes of its own, as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def run_script(script: Path, *launcher: str, timeout: int = 240, **options: object) -> subprocess.CompletedProcess:
    """One process; it gets the options as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *launcher, str(script), json.dumps(options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def launch(script: Path, processes: int, **options: object) -> subprocess.CompletedProcess:
    """Some processes, on a port of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}")
    return run_script(script, *launcher, **options)
