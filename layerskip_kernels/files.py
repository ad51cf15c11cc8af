"""The cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return the directory of tuned configurations, converted models and generated data; it may not exist yet.

    ``$LAYERSKIP_CACHE``, or else ``layerskip-kernels`` under ``$XDG_CACHE_HOME`` or ``~/.cache``. A ``~`` at the start
    of either variable is the home directory, and an empty variable counts as unset.
    """
    own = os.environ.get("LAYERSKIP_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(shared) / "layerskip-kernels").expanduser()
