"""Packages that import what they export only once it is asked for: torch alone takes seconds, and a typo needs none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from ._extras import need


def exports(
    package: str, homes: Mapping[str, Sequence[str]], needs: Mapping[str, Sequence[tuple[str, ...]]] | None = None
) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package, of which the modules ``homes`` have the names that go with them.

    ``needs`` has the arguments of `need` for what a module takes that may not be installed.

    None may be called as a module of the package is: importing that would put the module in its place.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = home_of[name]
        for arguments in (needs or {}).get(home, ()):
            need(*arguments)
        value = getattr(import_module(home, package), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
