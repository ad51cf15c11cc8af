"""Every link within the documents leads somewhere."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tools.site_links import on_page_markdown

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("tests/**/*.md")]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page):
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page):
    """The names of a page's headings, as sites derive them."""
    found = re.findall(
        r"^#+ +(.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE
    )
    plain = (unicodedata.normalize("NFKC", heading).replace("`", "").lower() for heading in found)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


MAPS = [page for page in PAGES if page.parent == ROOT or page.is_relative_to(ROOT / "docs")]


@pytest.mark.parametrize("page", MAPS, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    """Check files and folders in backticks, which are relative to the root or to a package."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text):
        root = next((one for one in (ROOT, ROOT / "python/layerskip") if (one / path.split("/")[0]).is_dir()), None)
        if root is not None:
            assert (root / path).exists(), f"{path} does not exist"


@pytest.mark.parametrize("page", ROOT.glob("docs/**/*.md"), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_site_links_to_its_own_pages(page):
    """What `make docs` renders; a file outside docs/ is named, not linked."""
    uri = page.relative_to(ROOT / "docs").as_posix()
    shown = on_page_markdown(prose(page), page=SimpleNamespace(file=SimpleNamespace(src_uri=uri)))
    for link in LINK.findall(shown):
        if not re.match(r"[a-z]+:", link):
            path = link.partition("#")[0]
            target = (page.parent / path).resolve() if path else page
            assert target.is_relative_to(ROOT / "docs"), f"{link} leads nowhere on the site"


def test_the_site_names_what_it_does_not_have():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="reference/kernels.md"))
    text = "[ops.md](../../benchmarks/results/ops.md), [a `test`](../../tests/time_limit.py#x), [x](../kernels.md#x)"
    assert on_page_markdown(text, page=page) == (
        "`benchmarks/results/ops.md`, a `test` (`tests/time_limit.py`), [x](../kernels.md#x)"
    )


def test_the_site_has_every_page():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in pages(one)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(nav)) == sorted(str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md"))
