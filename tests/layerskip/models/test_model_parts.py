"""The parts of a model by themselves: cache, layers, exit head."""

import copy

import pytest
import torch
from helpers import random_tokens, tiny_model, zeroed

from layerskip import EarlyExitHead, PartialDepthDecoder, SharedKVCache, adapt
from layerskip.models.generic_layers import attend_in_pieces, attend_masked
from layerskip_kernels import KVCache, LayerWeights, exit_head, partial_forward

# Largest difference to the expected states, which are of order 1.
TOLERANCES = {
    "prefill against forward, fp32": 1e-5,  # the same sums in another order; 2e-6 seen
    "attention of prompts": 4,  # spacings of the largest value; torch's masked attention comes to 2
    "int8 rows": 0.5 / 127,  # half a step, in units of a row's largest weight
}
HEADS, GROUPS, SIZE, WIDTH, FEATURES = 4, 2, 8, 24, 40


def layer_weights(seed=0, dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape, around=0.0):
        return (around + torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    keys = GROUPS * SIZE
    plain = LayerWeights(
        attn_norm=weight(WIDTH, around=1), q=weight(HEADS * SIZE, WIDTH), k=weight(keys, WIDTH), v=weight(keys, WIDTH),
        o=weight(WIDTH, HEADS * SIZE), mlp_norm=weight(WIDTH, around=1), gate=weight(FEATURES, WIDTH),
        up=weight(FEATURES, WIDTH), down=weight(WIDTH, FEATURES),
    )  # fmt: skip
    return plain._replace(**changes)


def make_decoder(layers=3, **changes):
    weights = [layer_weights(seed, **changes) for seed in range(layers)]
    return PartialDepthDecoder(weights, GROUPS, 1e-5, 10000.0 ** -(torch.arange(SIZE // 2) / (SIZE // 2)))


def states(batch, rows, width=WIDTH, seed=7):
    return torch.randn(batch, rows, width, generator=torch.Generator().manual_seed(seed))


class TestSharedKVCache:
    def test_shapes_and_lengths(self):
        cache = SharedKVCache(3, 2, 4, 17, 8, torch.bfloat16)
        assert cache.k.shape == cache.v.shape == (3, 2, 4, 17, 8)
        assert (cache.num_layers, cache.batch_size, cache.capacity) == (3, 2, 17)
        assert cache.k.dtype == torch.bfloat16
        assert cache.seq_lens.dtype == torch.int64
        assert cache.seq_lens.tolist() == [0, 0]

    def test_reset_sets_the_lengths_in_place_and_clears_nothing(self):
        cache = SharedKVCache(1, 2, 1, 9, 8)
        cache.k.fill_(3.0)
        addresses = cache.seq_lens.data_ptr(), cache.k.data_ptr()
        cache.seq_lens.fill_(4)
        cache.reset()
        assert cache.seq_lens.tolist() == [0, 0]
        assert (cache.seq_lens.data_ptr(), cache.k.data_ptr()) == addresses
        assert (cache.k == 3).all()

    def test_sizes_are_checked(self):
        with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
            SharedKVCache(1, 1, 1, 0, 8)


class TestDecoder:
    @pytest.mark.parametrize("split", [0, 1, 2, 3])
    def test_splitting_the_layers_changes_no_bit(self, split):
        decoder, hidden = make_decoder(), states(2, 3)
        whole_cache, split_cache = (zeroed(decoder.new_cache(2, 8)) for _ in range(2))
        whole = decoder(hidden, whole_cache)
        deep = decoder(decoder(hidden, split_cache, 0, split), split_cache, split, 3)
        assert torch.equal(whole, deep)
        assert torch.equal(whole_cache.k, split_cache.k)
        assert torch.equal(whole_cache.v, split_cache.v)

    def test_forward_is_the_op_and_leaves_the_lengths(self):
        decoder, hidden = make_decoder(), states(1, 2)
        cache, expected = (zeroed(decoder.new_cache(1, 8)) for _ in range(2))
        cache.seq_lens.fill_(3)
        out = decoder(hidden, cache, 1, 3, seq_lens=torch.tensor([1]))
        places = KVCache(expected.k, expected.v, *decoder.rope_tables, torch.tensor([1]))
        want = partial_forward(hidden, decoder.layer_weights(1, 3), places, 1, 3, decoder.eps)
        assert torch.equal(out, want)
        assert torch.equal(cache.k, expected.k)
        assert cache.seq_lens.tolist() == [3]

    @pytest.mark.parametrize("optional", [False, True], ids=["plain", "biases and norms"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_keys_and_values_alone_are_those_that_the_whole_layer_writes(self, dtype, optional):
        more = {}
        if optional:
            more = {"q_bias": torch.randn(HEADS * SIZE), "q_norm": torch.rand(SIZE) + 0.5}
            more |= {
                "k_bias": torch.randn(GROUPS * SIZE),
                "v_bias": torch.randn(GROUPS * SIZE),
                "k_norm": more["q_norm"] + 1,
            }
            more = {name: value.to(dtype) for name, value in more.items()}
        decoder, hidden = make_decoder(dtype=dtype, **more), states(2, 3).to(dtype)
        places = {"seq_lens": torch.tensor([2, 0]), "slots": torch.tensor([3, 1])}
        whole, alone = (zeroed(decoder.new_cache(4, 8)) for _ in range(2))
        decoder(hidden, whole, 1, 2, **places)
        decoder.write_keys(hidden, alone, 1, **places)
        assert whole.k[1].count_nonzero() > 0
        assert torch.equal(alone.k, whole.k)
        assert torch.equal(alone.v, whole.v)
        decoder.write_keys(hidden, zeroed(alone), 1, torch.nn.functional.linear, **places)
        # In bf16 another order of the sum may move a value, of order 1, by a rounding; norm and rotation add one each.
        most = TOLERANCES["prefill against forward, fp32"] if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(alone.k, whole.k, rtol=0, atol=most)
        with pytest.raises(ValueError, match=r"layers \[3, 4\) are not within the decoder's 3"):
            decoder.write_keys(hidden, alone, 3, **places)

    @pytest.mark.parametrize("chunks", [[11], [1, 10], [10, 1], [4, 4, 3], [1] * 11])
    def test_prefill_in_chunks_equals_forward(self, chunks):
        decoder, hidden = make_decoder(), states(2, 11)
        step_cache, cache = decoder.new_cache(2, 16), decoder.new_cache(2, 16)
        expected = decoder(hidden, step_cache)
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
        parts = []
        for part in hidden.split(chunks, dim=1):
            parts.append(decoder.prefill(part, cache))
            cache.seq_lens += part.shape[1]
        tolerance = TOLERANCES["prefill against forward, fp32"]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(cache.k[:, :, :, :11], step_cache.k[:, :, :, :11], atol=tolerance, rtol=0)
        torch.testing.assert_close(cache.v[:, :, :, :11], step_cache.v[:, :, :, :11], atol=tolerance, rtol=0)
        assert cache.k[:, :, :, 11:].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("chunks", [[200], [64, 136], [1, 199], [65, 65, 70]])
    def test_attention_of_prompts(self, chunks, dtype):
        """Both ways, against float64, in chunks of more and fewer rows than one call takes; NaN behind the prompt."""
        generator = torch.Generator().manual_seed(3)
        q, k, v = (torch.randn(2, 200, heads, 16, generator=generator).to(dtype) for heads in (6, 2, 2))
        keys, values = (
            torch.cat([x.transpose(1, 2), x.new_full((2, 2, 9, 16), torch.nan)], 2).contiguous() for x in (k, v)
        )
        heads = (q.double(), k.double().repeat_interleave(3, 2), v.double().repeat_interleave(3, 2))
        truth = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads), is_causal=True)
        truth = truth.transpose(1, 2).flatten(2)
        past, ours, masked = 0, [], []
        for part in q.split(chunks, dim=1):
            ours.append(attend_in_pieces(part, keys, values, torch.full((2,), past)))
            masked.append(attend_masked(part, keys, values, past))
            past += part.shape[1]
        allowed = TOLERANCES["attention of prompts"] * torch.finfo(dtype).eps * truth.abs().max()
        for attended in (ours, masked):
            assert (torch.cat(attended, 1) - truth).abs().max() <= allowed

    def test_prefill_of_nothing_is_nothing(self):
        decoder = make_decoder()
        assert decoder.prefill(states(1, 0), decoder.new_cache(1, 4)).shape == (1, 0, WIDTH)

    def test_prefill_refuses_ragged_lengths_and_a_full_cache(self):
        decoder = make_decoder()
        cache = decoder.new_cache(2, 4)
        cache.seq_lens.copy_(torch.tensor([1, 2]))
        with pytest.raises(ValueError, match=r"one length, these have \[1, 2\]"):
            decoder.prefill(states(2, 1), cache)
        cache.seq_lens.fill_(2)
        with pytest.raises(ValueError, match="3 rows after 2 positions do not fit a cache of capacity 4"):
            decoder.prefill(states(2, 3), cache)
        with pytest.raises((ValueError, RuntimeError), match="4"):
            decoder(states(2, 3), cache)

    def test_bad_input_names_the_value(self):
        decoder = make_decoder()
        cache, hidden = decoder.new_cache(1, 4), states(1, 1)
        with pytest.raises(ValueError, match=r"layers \[0, 4\) are not within the decoder's 3"):
            decoder(hidden, cache, 0, 4)
        with pytest.raises(ValueError, match=r"layers \[-1, 2\)"):
            decoder(hidden, cache, -1, 2)
        with pytest.raises(ValueError, match=r"shape \[1, 1, 25\], expected \[\*, \*, 24\]"):
            decoder(states(1, 1, width=25), cache)
        with pytest.raises(TypeError, match="bfloat16"):
            decoder(hidden.bfloat16(), cache)
        with pytest.raises(ValueError, match="no backward"):
            decoder(hidden.requires_grad_(), cache)
        with pytest.raises(ValueError, match="the cache has 3 heads of size 8, the decoder 2"):
            decoder(hidden.detach(), SharedKVCache(3, 1, 3, 4, SIZE))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"k": torch.zeros(8, WIDTH)}, ValueError, r"layer 1: k has shape \[8, 24\], expected \[16, 24\]"),
            ({"up": torch.zeros(FEATURES, WIDTH).half()}, TypeError, "layer 1: up has dtype float16"),
            ({"o": torch.zeros(HEADS * SIZE, WIDTH).T}, ValueError, "layer 1: o must be contiguous"),
            ({"q_norm": torch.zeros(7)}, ValueError, "layer 1: q_norm"),
        ],
    )
    def test_bad_weights_name_layer_and_tensor(self, changes, error, message):
        with pytest.raises(error, match=message):
            PartialDepthDecoder([layer_weights(), layer_weights(**changes)], GROUPS, 1e-5, torch.ones(SIZE // 2))

    def test_unsupported_head_size(self):
        with pytest.raises(ValueError, match="multiple of 8 up to 256, got 12"):
            PartialDepthDecoder([layer_weights()], GROUPS, 1e-5, torch.ones(6))

    def test_a_gradient_of_the_weights_is_no_obstacle(self):
        decoder = make_decoder().requires_grad_()
        out = decoder(states(1, 1), decoder.new_cache(1, 4))
        assert not out.requires_grad

    def test_converted_module_is_a_decoder_of_the_new_dtype(self):
        decoder = make_decoder()
        weights = [layer_weights(seed, torch.bfloat16) for seed in range(3)]
        frequencies = 10000.0 ** -(torch.arange(SIZE // 2) / (SIZE // 2))
        expected = PartialDepthDecoder(weights, GROUPS, 1e-5, frequencies)
        decoder.new_cache(1, 4)
        decoder.to(torch.bfloat16)
        assert decoder.dtype == torch.bfloat16
        assert all(weight.dtype == torch.bfloat16 for weight in decoder.layer_weights(0, 3))
        hidden = states(1, 4).bfloat16()
        assert torch.equal(decoder(hidden, decoder.new_cache(1, 8)), expected(hidden, expected.new_cache(1, 8)))
        assert torch.equal(decoder.rope_tables[0], expected.rope_tables[0])
        assert decoder.rope_tables[0].dtype == torch.float32

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_weight_list_follows_conversions(self, overwrite):
        """With the overwrite option of torch, a conversion puts new Parameters in the place of the old ones."""
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        try:
            decoder = make_decoder().to(torch.float16).to(torch.bfloat16)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
        current = {parameter.data_ptr() for parameter in decoder.parameters()}
        listed = decoder.layer_weights(0, 3)
        assert {weight.data_ptr() for weight in listed} == current
        assert all(weight.dtype == torch.bfloat16 for weight in listed)

    def test_deep_copy_has_its_own_weights(self):
        decoder = make_decoder()
        twin = copy.deepcopy(decoder)
        assert {w.data_ptr() for w in twin.layer_weights(0, 3)} == {p.data_ptr() for p in twin.parameters()}
        assert twin.layer_weights(0, 1)[0].data_ptr() != decoder.layer_weights(0, 1)[0].data_ptr()

    def test_tables_grow_with_the_largest_cache(self):
        decoder = make_decoder()
        for capacity, rows in ((4, 4), (9, 9), (5, 9)):
            decoder.new_cache(1, capacity)
            cos, sin = decoder.rope_tables
            assert cos.shape == sin.shape == (rows, SIZE // 2)


class TestSlots:
    def test_a_slot_is_a_view(self):
        cache = zeroed(SharedKVCache(2, 3, 2, 5, 8))
        own = cache.slot(1)
        own.k.fill_(1)
        own.seq_lens.fill_(4)
        assert own.batch_size == 1
        assert cache.k[:, 1].eq(1).all()
        assert cache.k[:, [0, 2]].eq(0).all()
        assert cache.seq_lens.tolist() == [0, 4, 0]
        for index in (-1, 3):
            with pytest.raises(ValueError, match=rf"slot must be in 0 … 2, got {index}"):
                cache.slot(index)

    def test_rows_go_to_the_slots_that_they_name(self):
        decoder = make_decoder()
        hidden, lengths = states(2, 3), torch.tensor([2, 0])
        plain, many = zeroed(decoder.new_cache(2, 8)), zeroed(decoder.new_cache(4, 8))
        expected = decoder(hidden, plain, seq_lens=lengths)
        out = decoder(hidden, many, seq_lens=lengths, slots=torch.tensor([3, 1]))
        assert torch.equal(out, expected)
        assert torch.equal(many.k[:, [3, 1]], plain.k)
        assert many.v[:, [0, 2]].eq(0).all()


class TestExitHead:
    def make(self, vocabulary=61, width=WIDTH, dtype=torch.float32):
        generator = torch.Generator().manual_seed(3)
        norm = 1 + 0.2 * torch.randn(width, generator=generator)
        return EarlyExitHead(norm.to(dtype), torch.randn(vocabulary, width, generator=generator).to(dtype), 1e-5)

    @pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)])
    def test_keeps_the_leading_shape(self, shape):
        head, hidden = self.make(), torch.randn(*shape, WIDTH)
        out = head(hidden)
        assert out.token.shape == out.logit.shape == out.logsumexp.shape == shape
        flat = exit_head(hidden.reshape(-1, WIDTH), head.norm_weight.detach(), head.head_weight.detach(), 1e-5)
        assert torch.equal(out.token.reshape(-1), flat.token)
        assert torch.equal(out.logsumexp.reshape(-1), flat.logsumexp)

    def test_it_draws_and_writes_logits(self):
        head, hidden = self.make(), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
        logits = torch.empty(4, 61)
        greedy = head(hidden, logits=logits)
        assert torch.equal(logits.argmax(-1), greedy.token)
        rows = torch.arange(4)
        temperature = torch.tensor([0.0, 0.0, 5.0, 5.0])
        drawn = [head(hidden, temperature, rows + seed, rows).token for seed in (0, 0, 9)]
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[0][:2], greedy.token[:2])
        assert not torch.equal(drawn[0], drawn[2])

    def test_int8_rows_are_within_half_a_step(self):
        head = self.make()
        with torch.no_grad():
            head.head_weight[4] = 0
        small = head.quantize()
        assert small.head_weight.dtype == torch.int8
        assert small.scale.dtype == torch.float32
        restored = small.head_weight.float() * small.scale[:, None]
        error = (restored - head.head_weight).abs().amax(1) / head.head_weight.abs().amax(1).clamp_min(1e-9)
        assert error.max() <= TOLERANCES["int8 rows"] * (1 + 1e-5)  # and the rounding of the division
        assert small.head_weight.abs().amax(1).tolist() == [127 if row != 4 else 0 for row in range(61)]
        assert small.norm_weight is head.norm_weight

    def test_subset_speaks_of_the_full_vocabulary(self):
        head, hidden = self.make(), torch.randn(7, WIDTH)
        ids = torch.tensor([0, 3, 17, 58, 60])
        small, full = head.quantize(ids), head.quantize()
        assert set(small(hidden).token.tolist()) <= set(ids.tolist())
        assert torch.equal(small.head_weight, full.head_weight[ids])
        assert torch.equal(small.scale, full.scale[ids])

    def test_rows_past_the_first_block_are_quantised_too(self):
        generator = torch.Generator().manual_seed(0)
        head = EarlyExitHead(torch.ones(8), torch.randn(8192 + 3, 8, generator=generator), 1e-5)
        ids = torch.arange(0, 8195)
        for small in (head.quantize(), head.quantize(ids)):
            restored = small.head_weight[8190:].float() * small.scale[8190:, None]
            torch.testing.assert_close(restored, head.head_weight[8190:].detach(), atol=0.02, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_conversion_leaves_scale_and_rows(self, dtype):
        small = self.make().quantize(torch.tensor([1, 2, 5]))
        scale, rows = small.scale.clone(), small.head_weight.clone()
        small.to(dtype)
        assert torch.equal(small.scale, scale)
        assert torch.equal(small.head_weight, rows)
        assert small.norm_weight.dtype == dtype
        assert small(torch.randn(2, WIDTH, dtype=dtype)).token.shape == (2,)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([3, 1], "sorted"),
            ([1, 1], "each token once"),
            ([-1, 4], "token id -1 is outside the vocabulary of 61"),
            ([4, 61], "token id 61 is outside"),
            ([], "non-empty"),
        ],
    )
    def test_bad_token_ids(self, ids, message):
        with pytest.raises(ValueError, match=message):
            self.make().quantize(torch.tensor(ids, dtype=torch.int64))

    def test_bad_heads(self):
        head = self.make()
        with pytest.raises(ValueError, match="quantised or reduced already"):
            head.quantize().quantize()
        with torch.no_grad():
            head.head_weight[9, 2] = torch.nan
        with pytest.raises(ValueError, match="row 9 of the head"):
            head.quantize()
        with pytest.raises(ValueError, match="no backward"):
            self.make()(torch.randn(1, WIDTH, requires_grad=True))
        with pytest.raises(ValueError, match=r"\[5\], head_weight \[7, 6\]"):
            EarlyExitHead(torch.ones(5), torch.ones(7, 6), 1e-5)


def test_parts_work_in_a_users_own_model():
    """Parts taken from an adapted model, put into a plain module, still share the storage."""

    class Exit(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.decoder, self.head = model.decoder, model.head

        def forward(self, hidden, cache):
            return self.head(self.decoder(hidden, cache, 0, 2))

    hf = tiny_model("qwen3")
    model = adapt(hf)
    own = Exit(model)
    out = own(model.embed(random_tokens(1, 3)), model.decoder.new_cache(1, 8))
    assert out.token.shape == (1, 3)
    assert own.head.head_weight.data_ptr() == hf.lm_head.weight.data_ptr()
