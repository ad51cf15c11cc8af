"""Fixtures that several files share."""

import pytest


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """A folder with the files that `measured.measure` writes."""
    from measured import measure

    folder = tmp_path_factory.mktemp("measured")
    measure(folder)
    return folder
