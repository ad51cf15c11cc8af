"""Write docs/recipes.md from the recipe dataclasses: ``python -m tools.recipe_reference``.

The meaning of a key is the comment beside or above its field.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from layerskip.training.recipe import ExitRecipe, Recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
HEAD = """# Recipe keys

Write the keys that differ from their defaults into a YAML file, or pass them on the command line.
[Training](training.md) describes what they do.

```
layerskip train --set model=DIR --set tasks=[pairs.jsonl] --set learning_rate=0.001
layerskip train-exit --model DIR --texts texts.jsonl --minutes 30 --output exit
```

An unknown key is refused, and the nearest one named. `python -m tools.recipe_reference` writes this page.
"""
PARTS = {
    "layerskip train": Recipe,
    "layerskip train-exit": ExitRecipe,
}


def page() -> str:
    """Return the page: a table of keys for each recipe."""
    return "\n".join([HEAD, *(f"## {command}\n\n{table(recipe)}\n" for command, recipe in PARTS.items())])


def table(recipe: type) -> str:
    """Return a row for each key: its default and its meaning."""
    comments = dict(comments_of(recipe))
    rows = [f"| `{one.name}` | {default_of(one)} | {comments[one.name]} |" for one in dataclasses.fields(recipe)]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def comments_of(recipe: type) -> Iterator[tuple[str, str]]:
    """Yield each field's name and comment; a ValueError names a field without one."""
    above: list[str] = []
    for line in inspect.getsource(recipe).partition('"""\n\n')[2].splitlines():
        if comment := re.fullmatch(r"    # (.*)", line):
            above.append(comment[1])
        elif entry := re.match(r"    (\w+): [^#]*(?:# (.*))?", line):
            text = " ".join([*above, *filter(None, [entry[2]])])
            if not text:
                raise ValueError(f"{recipe.__name__}.{entry[1]} has no comment, which {PAGE.name} would show")
            yield entry[1], text
            above = []
        elif not line.startswith("    ") or line.startswith("    def "):
            return


def default_of(entry: dataclasses.Field) -> str:
    """Return a field's default as YAML; a dash where it has none."""
    value = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    if value is None or value == []:
        return "–"
    if dataclasses.is_dataclass(value):
        items = dataclasses.asdict(value).items()  # type: ignore[arg-type]
        return "`{" + ", ".join(f"{key}: {inner}" for key, inner in items) + "}`"
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{', '.join(value) if isinstance(value, list) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
