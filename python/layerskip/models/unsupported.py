"""What is raised for a model that the kernels do not compute."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The kernels do not compute this model, or a feature of it; the message says what they do compute."""


def unsupported(what: str, supported: str) -> UnsupportedModelError:
    """The error for ``what``, which names what would be right."""
    return UnsupportedModelError(f"{what} is not supported; supported: {supported}")
