"""What a JSON file must look like, and the message where it does not."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Each(NamedTuple):
    """An object of any keys, whose values have a shape."""

    shape: Any


class Maybe(NamedTuple):
    """A shape, or null."""

    shape: Any


class Above(NamedTuple):
    """A number above another one."""

    limit: float


_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def check(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError where a value does not have a shape.

    Parameters
    ----------
    value : object
        What was read from JSON.
    shape : type, list, tuple, dict, `Each`, `Maybe` or `Above`
        ``float`` is any finite number. A list has the shape of its elements, a tuple those of just so many. A dict has
        the keys that must be there; those that end with "?" may be missing, and others are not looked at.
    where : str
        What the value is; begins the message.
    """
    if isinstance(shape, dict):
        _expect(isinstance(value, dict), "an object", value, where)
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                check(value[name], inner, f"{where}.{name}" if where else name)
            elif name == key:
                raise ValueError(f"{where or 'it'} has no {name!r}")
    elif isinstance(shape, list):
        _expect(isinstance(value, list), "a list", value, where)
        for index, one in enumerate(value):
            check(one, shape[0], f"{where}[{index}]")
    elif type(shape) is tuple:
        _expect(isinstance(value, list) and len(value) == len(shape), f"a list of {len(shape)}", value, where)
        for index, (one, inner) in enumerate(zip(value, shape, strict=True)):
            check(one, inner, f"{where}[{index}]")
    elif isinstance(shape, Each):
        _expect(isinstance(value, dict), "an object", value, where)
        for key, one in value.items():
            check(one, shape.shape, f"{where}.{key}")
    elif isinstance(shape, Maybe):
        if value is not None:
            check(value, shape.shape, where)
    elif isinstance(shape, Above):
        _expect(_is(value, float) and value > shape.limit, f"a number above {shape.limit:g}", value, where)
    else:
        _expect(_is(value, shape), _WORDS[shape], value, where)


def _is(value: Any, shape: type) -> bool:
    if shape in (int, float) and isinstance(value, bool):
        return False
    if shape is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, shape)


def _expect(holds: bool, words: str, value: Any, where: str) -> None:
    if not holds:
        raise ValueError(f"{where or 'it'} must be {words}, got {str(value)[:40]!r}")
