"""The library knows the example package's names where it is not installed, too."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest

from layerskip import registry
from tests.example_package import requires_example


@requires_example
@pytest.mark.parametrize("group", registry.EXAMPLE)
def test_what_is_provided_is_what_is_known(group: str) -> None:
    provided = {entry.name for entry in distribution("layerskip-smollm2").entry_points if entry.group == group}
    assert provided == set(registry.EXAMPLE[group])


@requires_example
def test_every_name_leads_to_what_its_group_asks_for() -> None:
    for name in registry.EXAMPLE[registry.MODELS]:
        model = registry.get(registry.MODELS, name)
        assert callable(model.load)
        head = model.draft_head(name)
        assert (head is None) == (name == "smollm2")
        assert head is None or Path(head).is_file()
    for name in registry.EXAMPLE[registry.TASKS]:
        task = registry.get(registry.TASKS, name)
        assert task.SPLITS[0] == "train"
        assert callable(task.load)
    for exhibit in registry.get(registry.DEMOS, "smollm2"):
        assert exhibit.model in registry.EXAMPLE[registry.MODELS]
        assert Path(exhibit.prompts).is_file()
