"""The README's program runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("layerskip_smollm2") is None, reason="the README's model is not installed: pip install ./examples/smollm2"
)
def test_the_program_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parse, said = done.stdout.rsplit("\n", 2)[0], done.stdout.splitlines()[-1]
    assert "HassTurnOn" in parse
    share = re.search(r"(\d+)% of the drafts accepted", said)
    assert share is not None
    assert int(share[1]) > 50
