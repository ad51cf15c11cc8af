"""Compiled, as vLLM runs by default."""

from __future__ import annotations

import pytest

from .engines import engine, generate
from .models import copied, prompts

LENGTHS = (3, 17, 40)


def run(model, drafts, **options):
    """Tokens, and how many drafts were accepted."""
    with engine(model, **drafts, **options) as llm:
        return generate(llm, prompts(*LENGTHS)), llm.drafts


@pytest.mark.slow
@pytest.mark.parametrize("draft_layers", [False, True], ids=["first layers", "draft_layers"])
def test_compiled_drafts_what_eager_drafts(draft_layers, model, tmp_path, monkeypatch):
    first = {"load_format": "layerskip", "model_loader_extra_config": {"exit_layer": 2}}
    drafts = copied(model) if draft_layers else first
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert run(model, drafts, enforce_eager=False) == run(model, drafts)


def test_the_graph_of_one_exit_is_not_taken_for_another(model):
    """vLLM finds compiled graphs on the disk by the hash of the configuration, which knows no exits by itself."""
    from vllm.engine.arg_utils import EngineArgs

    from layerskip.vllm.draft import _compiled_as

    config = EngineArgs(model=str(model), additional_config={"mine": 1}).create_engine_config()
    exits = [(1, 0, False), (2, 0, False), (2, 1, False), (2, 1, True)]
    hashes = {_compiled_as(config, *exit).compute_hash() for exit in exits}
    assert len(hashes | {config.compute_hash()}) == 1 + len(exits)
    assert config.additional_config == {"mine": 1}
