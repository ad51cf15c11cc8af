"""Serve a model over HTTP, in the form of OpenAI's API."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import warnings

from rich.console import Console

from .._imports import need
from . import options

SECONDS_TO_FINISH = 10  # for running requests, after a signal to stop
LOCAL = ("127.0.0.1", "localhost", "::1")


def run(args: argparse.Namespace, console: Console) -> int:
    """Serve until SIGINT or SIGTERM."""
    uvicorn = need("uvicorn", "serving")
    need("starlette", "serving")
    from ..server.app import create_app

    key = args.api_key or os.environ.get("LAYERSKIP_API_KEY")
    if args.host not in LOCAL and key is None:
        warnings.warn(f"whoever reaches {args.host} can use this server: give --api-key", stacklevel=1)
    with _bound(args.host, args.port) as listener:
        model, tokenizer = options.load(args, Console(stderr=True))
        decoder = options.decoder(args, model)
        decoder.tokenizer = tokenizer
        app = create_app(
            decoder,
            args.model,
            max_batch=args.max_batch,
            max_seq_len=options.max_seq_len(args, decoder),
            max_waiting=args.max_waiting,
            api_key=key,
        )
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_FINISH)
        server = uvicorn.Server(config)
        host = f"[{args.host}]" if ":" in args.host else args.host
        port = listener.getsockname()[1]
        console.print(f"serving {args.model} at http://{host}:{port}/v1", markup=False, highlight=False, soft_wrap=True)
        # uvicorn stops gracefully at either signal, then raises it again.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
    if not server.started:
        return 1
    console.print("stopped")
    return 0


def _bound(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a port that is taken is found before the model is loaded."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port must be in 0 … 65535, got {port}")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"can't listen on {host}, port {port}: {error.strerror}") from error
    return listener
