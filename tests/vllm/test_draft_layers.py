"""Exits with draft layers: where these are copies of the layers that follow the exit, every draft is right.

That is so only if the draft layers have the keys and values of every token.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from layerskip import Exit

from .engines import GREEDY, cache_blocks, core, engine, generate, runner, vllm
from .models import ARCHITECTURES, LAYERS, VOCABULARY, copied, prompts, write_model

LENGTHS = (3, 17, 40, 100, 7, 9, 64, 200)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of whose layers each counts."""
    return write_model(tmp_path_factory.mktemp("deep"), upper=1.0)


@pytest.fixture(scope="module")
def plain(deep):
    """What vLLM gives without speculation, alone and in a batch, and how many blocks its cache has."""
    with engine(deep) as llm:
        alone = [generate(llm, [prompt])[0] for prompt in prompts(*LENGTHS)]
        return alone, generate(llm, prompts(*LENGTHS)), cache_blocks(llm)


@pytest.mark.parametrize("exit_layer", [2, 3], ids=["two draft layers", "one draft layer"])
def test_every_draft_is_right(exit_layer, deep, plain):
    alone, batch, capacity = plain
    with engine(deep, **copied(deep, exit_layer)) as llm:
        assert [generate(llm, [prompt])[0] for prompt in prompts(*LENGTHS)] == alone
        assert generate(llm, prompts(*LENGTHS)) == batch
        assert llm.drafts.acceptance == 1
        layers = LAYERS + LAYERS - exit_layer
        assert cache_blocks(llm) == capacity * LAYERS // layers
        caches = [cache.data_ptr() for cache in runner(llm).kv_caches if cache.numel()]
        assert len(set(caches)) == layers
        assert len(core(llm).scheduler.kv_cache_config.kv_cache_groups) == 1


def test_without_draft_layers_it_is_the_exit_of_its_layer(deep, plain):
    """Far fewer drafts are right, so the tests above see what the draft layers do."""
    with engine(deep, load_format="layerskip", model_loader_extra_config={"exit_layer": 2}) as llm:
        assert generate(llm, prompts(*LENGTHS)) == plain[1]
        assert llm.drafts.acceptance < 0.5


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "Llama"])
def test_architecture(architecture, tmp_path):
    write_model(tmp_path, architecture, upper=1.0)
    with engine(tmp_path, **copied(tmp_path)) as llm:
        generate(llm, prompts(*LENGTHS))
        assert llm.drafts.acceptance == 1


def test_chunked_prefill_and_prefix_caching(deep):
    """Prompts in pieces of 64 tokens; those that share their beginnings find the draft layers' keys and values too."""
    options = {"max_num_batched_tokens": 64, "block_size": 32, "enable_prefix_caching": True}
    (head,) = prompts(100)
    texts = [head + tail for tail in prompts(5, 30, 1, 60, seed=1)]
    with engine(deep, **options) as llm:
        expected = [generate(llm, texts), generate(llm, texts)]
    with engine(deep, **options, **copied(deep)) as llm:
        assert [generate(llm, texts), generate(llm, texts)] == expected
        assert llm.drafts.acceptance == 1
        again = llm.generate({"prompt_token_ids": texts[0]}, vllm.SamplingParams(**GREEDY), use_tqdm=False)
        assert again[0].num_cached_tokens == 96


def test_a_sequence_that_was_thrown_out_is_read_again(deep):
    options = {"block_size": 32, "num_gpu_blocks_override": 12, "enable_prefix_caching": False}
    texts = prompts(60, 10, 33, 90, 31, 32, 2, 64)  # vLLM counts drafts for a prompt of one token that nobody made
    with engine(deep, **options, **copied(deep)) as llm:
        generate(llm, texts, tokens=64)
        assert llm.drafts.acceptance == 1


def test_two_ranks_have_parts_of_the_draft_layers(deep, plain, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(deep, **ranks, **copied(deep)) as llm:
        assert generate(llm, prompts(*LENGTHS)) == plain[1]
        assert llm.drafts.acceptance == 1


def test_a_head_of_the_tokens_that_the_exit_names(deep, plain):
    _, expected, _ = plain
    chosen = sorted({token for tokens in expected for token in tokens})
    with engine(deep, **copied(deep, token_ids=torch.tensor(chosen))) as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
        assert llm.drafts.acceptance > 0.9  # in int8
        assert runner(llm).drafter.model._head._head.num_rows == len(chosen) < VOCABULARY


@pytest.mark.parametrize("head", ["exit", "vllm"])
def test_the_norm_is_the_exits(head, deep, plain):
    """With the opposite norm the least probable tokens are drafted."""
    with engine(deep, **copied(deep, draft_head=head, norm=-1.0)) as llm:
        assert generate(llm, prompts(*LENGTHS)) == plain[1]
        assert llm.drafts.drafted > llm.drafts.accepted == 0


def test_vllms_own_head(deep, plain):
    with engine(deep, **copied(deep, draft_head="vllm")) as llm:
        assert generate(llm, prompts(*LENGTHS)) == plain[1]
        assert llm.drafts.acceptance == 1


def test_draft_layers_of_another_shape_are_refused(deep):
    options = copied(deep)
    path = options["model_loader_extra_config"]["exit"]
    exit = Exit.load(path)
    Exit(2, exit.norm_weight, LAYERS, VOCABULARY, [exit.draft_layers[0]._replace(q_bias=torch.zeros(128))]).save(path)
    message = r"draft layer 0 of the exit: q_bias has shape \[128\], that of the model's layers none"
    with pytest.raises(ValueError, match=message), engine(deep, **options):
        pass


@pytest.mark.parametrize(
    ("head", "method", "message"),
    [(None, "greedy", "draft_head 'vllm' drafts with"), (object(), "probabilistic", "'probabilistic' drafts with")],
)
def test_a_corrected_head_is_not_vllms(head, method, message):
    from layerskip.vllm.draft import _check_correction

    config = SimpleNamespace(speculative_config=SimpleNamespace(draft_sample_method=method))
    plain = Exit(1, torch.ones(8), LAYERS, VOCABULARY)
    corrected = Exit(
        1, torch.ones(8), LAYERS, VOCABULARY, head_down=torch.ones(2, 8), head_up=torch.ones(VOCABULARY, 2)
    )
    _check_correction(plain, head, config)
    with pytest.raises(NotImplementedError, match=message):
        _check_correction(corrected, head, config)


def test_draft_layers_are_plain_and_attend_as_the_targets_layers():
    """Beside a quantised target, and whatever attention vLLM would choose for a draft model."""
    from vllm.config import AttentionConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from layerskip.vllm.draft_layers import _unquantised

    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.backend = AttentionBackendEnum.TRITON_ATTN
    given = SimpleNamespace(quant_config="awq", attention_config=AttentionConfig(flash_attn_version=3))
    made = _unquantised(given, torch.nn.ModuleList([torch.nn.Linear(1, 1), attention]))
    assert made.quant_config is None
    assert made.attention_config.backend is AttentionBackendEnum.TRITON_ATTN
    assert made.attention_config.flash_attn_version == 3
    assert given.quant_config == "awq"
    assert given.attention_config.backend is None
