"""mkdocs hook: the site has no files outside ``docs/``, so a link to one becomes its path."""

import os.path
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    folder = os.path.dirname(f"docs/{page.file.src_uri}")

    def shown(link: re.Match[str]) -> str:
        text, path = link[1], os.path.normpath(f"{folder}/{link[2].partition('#')[0]}")
        if path.startswith("docs/"):
            return link[0]
        return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"

    return _LINK.sub(shown, markdown)
