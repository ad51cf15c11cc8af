"""With ``--load-format layerskip`` vLLM gives the tokens that it gives without, from drafts that are accepted."""

from __future__ import annotations

import pytest
import torch

from .engines import cache_blocks, core, engine, generate, runner, vllm
from .models import ARCHITECTURES, prompts, write_model

LENGTHS = (3, 17, 40, 100, 7, 9, 64, 200)
EXIT = {"exit_layer": 2}
SPECULATIVE = {"load_format": "layerskip", "model_loader_extra_config": EXIT}


@pytest.fixture(scope="module")
def plain(model):
    """What vLLM gives without speculation: tokens alone and in a batch, and the number of cache blocks."""
    with engine(model) as llm:
        alone = [generate(llm, [prompt])[0] for prompt in prompts(*LENGTHS)]
        return alone, generate(llm, prompts(*LENGTHS)), cache_blocks(llm)


def test_tokens_and_cache_blocks_are_those_without_speculation(model, plain):
    alone, batch, capacity = plain
    with engine(model, **SPECULATIVE) as llm:
        assert [generate(llm, [prompt])[0] for prompt in prompts(*LENGTHS)] == alone
        assert generate(llm, prompts(*LENGTHS)) == batch
        assert llm.drafts.acceptance > 0.2
        assert cache_blocks(llm) == capacity


def test_the_drafter_owns_no_weight_and_no_cache(model):
    with engine(model, **SPECULATIVE) as llm:
        target, draft = runner(llm).model, runner(llm).drafter.model
        of_target, of_draft = ({t.data_ptr() for t in [*m.parameters(), *m.buffers()]} for m in (target, draft))
        assert of_draft <= of_target
        caches = [cache.data_ptr() for cache in runner(llm).kv_caches if cache.numel()]
        assert len(set(caches)) == target.config.num_hidden_layers


@torch.inference_mode()
@pytest.mark.parametrize("draft_head", ["full", "vllm"])
def test_drafts_are_drawn_from_the_heads_logits(draft_head, model):
    """Of normed states: our own head takes raw ones and norms them itself, vLLM's gets them normed."""
    options = {**SPECULATIVE, "model_loader_extra_config": {**EXIT, "draft_head": draft_head}}
    with engine(model, **options) as llm:
        target, draft = runner(llm).model, runner(llm).drafter.model
        raw = torch.randn(3, target.config.hidden_size)
        normed = target.model.norm(raw)
        given = raw if draft_head == "full" else normed
        assert torch.equal(draft.compute_logits(given), target.compute_logits(normed))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "Llama"])
def test_architecture(architecture, tmp_path):
    write_model(tmp_path, architecture)
    with engine(tmp_path) as llm:
        expected = generate(llm, prompts(*LENGTHS))
    with engine(tmp_path, **SPECULATIVE) as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
        assert llm.drafts.acceptance > 0.2


def test_chunked_prefill_and_prefix_caching(model):
    """Prompts in pieces of 64 tokens, which share their beginnings, among sequences that decode."""
    options = {"max_num_batched_tokens": 64, "block_size": 32, "enable_prefix_caching": True}
    (head,) = prompts(100)
    texts = [head + tail for tail in prompts(5, 30, 1, 60, seed=1)]
    with engine(model, **options) as llm:
        expected = [generate(llm, texts), generate(llm, texts)]
    with engine(model, **options, **SPECULATIVE) as llm:
        assert [generate(llm, texts), generate(llm, texts)] == expected
        assert llm.drafts.acceptance > 0.2


def test_rows_that_are_left_out_change_no_draft(model, monkeypatch):
    """After a step with a prompt one row a sequence drafts; from all rows the drafts would be the same.

    Sequences of which drafts were just rejected take part in such steps, too.
    """
    from layerskip.vllm.rows import LastRows

    options = {"max_num_batched_tokens": 64, "block_size": 32}
    texts, counts, rejected, of = prompts(*LENGTHS, 150, 90, 200), [], [], LastRows.of

    def noted(self, metadata, slots, positions):
        rejected.append(bool((slots[: int(metadata.num_actual_tokens)] < 0).any()))
        return of(self, metadata, slots, positions)

    monkeypatch.setattr(LastRows, "of", noted)
    for worth_it in (LastRows.worth_it, lambda self, metadata: False):
        monkeypatch.setattr(LastRows, "worth_it", worth_it)
        with engine(model, **options, **SPECULATIVE) as llm:
            generate(llm, texts, tokens=12)
            counts.append((llm.drafts.drafted, llm.drafts.accepted))
    assert counts[0] == counts[1]
    assert set(rejected) == {False, True}


def test_full_cache(model):
    """Room for three of the eight sequences, so some are thrown out and read again; and up to the last position."""
    options = {"block_size": 32, "num_gpu_blocks_override": 12, "max_model_len": 128, "enable_prefix_caching": False}
    texts = prompts(60, 10, 33, 90, 31, 32, 1, 64)
    with engine(model, **options) as llm:
        expected = generate(llm, texts, tokens=128)
    with engine(model, **options, **SPECULATIVE) as llm:
        assert generate(llm, texts, tokens=128) == expected
        assert max(len(text) + len(new) for text, new in zip(texts, expected, strict=True)) == 128
        assert core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 11  # one is vLLM's own


def test_abort_in_mid_stream(model, plain):
    """The others go on as if the aborted one had never been, and a new one takes its place."""
    texts, (_, expected, _) = prompts(*LENGTHS), plain
    params = vllm.SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False)
    with engine(model, **SPECULATIVE) as llm:
        for number, text in enumerate(texts[:4]):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": text}, params)
        done = {}
        for step in range(100):
            if step == 3:
                llm.llm_engine.abort_request(["1"])
                llm.llm_engine.add_request("4", {"prompt_token_ids": texts[4]}, params)
            done |= {out.request_id: out for out in llm.llm_engine.step() if out.finished}
            if not llm.llm_engine.has_unfinished_requests():
                break
        tokens = {name: list(out.outputs[0].token_ids) for name, out in done.items()}
        assert tokens == {str(number): expected[number] for number in (0, 2, 3, 4)}
        pool = core(llm).scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == cache_blocks(llm) - 1
