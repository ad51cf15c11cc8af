"""Fixtures that several files share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Models of a few thousand weights are too small for a second thread, which would wait at every barrier."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """A folder with the files that `measured.measure` writes."""
    from measured import measure

    folder = tmp_path_factory.mktemp("measured")
    measure(folder)
    return folder
