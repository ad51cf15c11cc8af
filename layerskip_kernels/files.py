"""Where this library, and what is built on it, keep files of their own."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The folder of tuned configurations, converted models and drawn data; it need not exist yet.

    ``$LAYERSKIP_CACHE``, or else ``layerskip-kernels`` under ``$XDG_CACHE_HOME`` or ``~/.cache``. A ``~`` at the start
    of either variable is the home directory, and an empty variable counts as unset.
    """
    own = os.environ.get("LAYERSKIP_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(shared) / "layerskip-kernels").expanduser()
