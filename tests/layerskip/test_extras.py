"""Error messages for packages that are missing or too old, and the packages' metadata."""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.resources import files

import pytest
from tiny import tiny_model

import layerskip
import layerskip.training
import layerskip_kernels
from layerskip import DraftHead
from layerskip._imports import EXTRAS, need
from layerskip.training.recipe import read_recipe


@pytest.mark.parametrize("name", EXTRAS)
def test_a_package_that_is_missing(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"^a test needs {name}: pip install \"layerskip-kernels\[{EXTRAS[name]}\]\"$"
    with pytest.raises(ModuleNotFoundError, match=message):
        need(name, "a test")


def test_what_is_missing_within_a_package_is_its_own_affair(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"^import of safetensors\.torch halted"):
        need("safetensors.torch", "a test")


USES = {
    "transformers": (lambda path: layerskip.load(path), "loading models needs"),
    "safetensors": (lambda path: DraftHead([1], 5).save(path), "saving a draft head needs"),
    "accelerate": (lambda path: layerskip.training.LayerSkipTrainer, "training needs"),
    "yaml": (lambda path: read_recipe(path), "reading a recipe needs"),
}


@pytest.mark.parametrize("name", USES)
def test_who_needs_it_says_so(monkeypatch, tmp_path, name):
    use, message = USES[name]
    monkeypatch.delitem(vars(layerskip.training), "LayerSkipTrainer", raising=False)  # kept from another test
    for loaded in [one for one in sys.modules if one.partition(".")[0] == name]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"^{message} {name}: pip install"):
        use(tmp_path)


def test_the_drop_in_needs_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(layerskip.__dict__, "generate", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"^layerskip\.generate needs transformers: pip install"):
        _ = layerskip.generate


@pytest.mark.parametrize("old", ["4.49.0", "4.56.2"])
def test_a_transformers_that_is_too_old_is_refused_with_the_range(monkeypatch, tmp_path, old):
    model = tiny_model()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", old)
    for use in (lambda: layerskip.adapt(model), lambda: layerskip.accelerate(model), lambda: layerskip.load(tmp_path)):
        with pytest.raises(ImportError, match=rf"transformers {old} is too old, 4\.57 to 5 are supported: pip install"):
            use()


@pytest.mark.parametrize("new", ["4.57.0", "5.0.0rc1", "6.1.dev0"])
def test_others_are_not(monkeypatch, new):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", new)
    assert layerskip.adapt(tiny_model()).num_layers == 4


def test_version_and_types():
    assert layerskip.__version__ == layerskip_kernels.__version__ == version("layerskip-kernels")
    for package in (layerskip, layerskip_kernels):
        assert files(package).joinpath("py.typed").is_file()
