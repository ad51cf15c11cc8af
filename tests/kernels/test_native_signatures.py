"""The compiled libraries take what the schemas say: their registration unpacks arguments unchecked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import layerskip_kernels  # noqa: F401  (defines the ops)

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TYPES = {
    "Tensor": "const Tensor&",
    "Optional[Tensor]": "const std::optional<Tensor>&",
    "List[Tensor]": "const std::vector<Tensor>&",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
    "str": "const std::string&",
}


def implementations() -> list[tuple[str, str, str]]:
    """(library, op, name of the C++ function) of every registration."""
    found = []
    for path in sorted(CSRC.glob("*/**/*.cpp")) + sorted(CSRC.glob("*/**/*.cu")):
        for op, function in re.findall(r'm\.impl\("(\w+)",\s*TORCH_BOX\(&lsk::(\w+)\)', path.read_text()):
            found.append((str(path.relative_to(CSRC)), op, function))
    return found


def parameters(text: str, function: str) -> list[tuple[str, str]]:
    """(type, name) of each parameter of a function's definition."""
    match = re.search(rf"^[\w:<>, ]+ {function}\(([^)]*)\)\s*{{", text, re.MULTILINE)
    assert match is not None, f"no definition of {function}"
    return [tuple(" ".join(one.split()).rsplit(" ", 1)) for one in match[1].split(",")]  # type: ignore[misc]


@pytest.mark.parametrize(("source", "op", "function"), implementations())
def test_matches_the_schema(source: str, op: str, function: str) -> None:
    schema = getattr(torch.ops.layerskip_native, op).default._schema
    wanted = [(TYPES[str(argument.type)], argument.name) for argument in schema.arguments]
    actual = [(kind, name.removesuffix("_in")) for kind, name in parameters((CSRC / source).read_text(), function)]
    assert actual == wanted


def test_every_registration_is_seen() -> None:
    sources = [*CSRC.glob("*/**/*.cpp"), *CSRC.glob("*/**/*.cu")]
    count = sum(len(re.findall(r'm\.impl\("(\w+)"', path.read_text())) for path in sources)
    assert count == len(implementations()) > 0
