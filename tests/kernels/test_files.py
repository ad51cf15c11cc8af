"""One cache folder, by one rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerskip_kernels.files import cache_directory

HOME = Path("/home/someone")
CASES = [
    ({}, HOME / ".cache/layerskip-kernels"),
    ({"XDG_CACHE_HOME": "/caches"}, Path("/caches/layerskip-kernels")),
    ({"XDG_CACHE_HOME": "~/caches"}, HOME / "caches/layerskip-kernels"),
    ({"LAYERSKIP_CACHE": "/own"}, Path("/own")),
    ({"LAYERSKIP_CACHE": "~/own", "XDG_CACHE_HOME": "/caches"}, HOME / "own"),
    ({"LAYERSKIP_CACHE": "", "XDG_CACHE_HOME": ""}, HOME / ".cache/layerskip-kernels"),
]


@pytest.mark.parametrize(("environment", "expected"), CASES)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Path) -> None:
    for name in ("LAYERSKIP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(HOME), **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == expected


def test_tuned_configurations_are_kept_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from triton import __version__

    from layerskip_kernels.triton import _launch

    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    assert _launch.cache_file("A GPU/1") == tmp_path / f"triton-{__version__}-A-GPU-1.json"
