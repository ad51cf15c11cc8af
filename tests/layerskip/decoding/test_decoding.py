"""Self-speculative decoding gives what autoregressive decoding gives, bit for bit, whatever the drafts are like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, LAYERS, UPPER, VOCABULARY, native_missing, prompt_of, requires_native, tiny_model
from tokenizers_of import byte_level

from layerskip import Conversation, DraftHead, SelfSpeculativeDecoder, SharedKVCache
from layerskip.decoding.batch import Batch
from layerskip_kernels import use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("one_thread")


def last_cache(decoder: SelfSpeculativeDecoder) -> SharedKVCache:
    """What the last call decoded with."""
    return decoder._draft_model.caches.idle[-1][0]


def cached(decoder: SelfSpeculativeDecoder, out) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the last call's sequence, which the states of all its positions went into."""
    end = out.sequences.shape[1] - 1  # the last token was not put in
    cache = last_cache(decoder)
    return cache.k[:, 0, :, :end].clone(), cache.v[:, 0, :, :end].clone()


def same_bits(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@requires_native
@pytest.mark.parametrize("upper", UPPER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_exit_and_draft_length_is_lossless(architecture, dtype, upper):
    decoder = SelfSpeculativeDecoder(tiny_model(architecture, dtype, upper), exit_layer=1)
    prompt = prompt_of(7)
    plain = decoder.generate(prompt, 24, strategy="autoregressive")
    expected = cached(decoder, plain)
    for exit_layer in range(1, LAYERS):
        for count in range(1, 9):
            out = decoder.generate(prompt, 24, exit_layer=exit_layer, num_speculations=count)
            assert torch.equal(out.sequences, plain.sequences), (exit_layer, count)
            assert same_bits(cached(decoder, out), expected), (exit_layer, count)
            assert upper != "silent" or out.stats.acceptance_rate == 1.0


@requires_native
@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads_are_lossless_too(threads):
    torch.set_num_threads(threads)
    decoder = SelfSpeculativeDecoder(tiny_model("smollm2", torch.bfloat16, "weak"), exit_layer=1, num_speculations=5)
    plain = decoder.generate(prompt_of(7), 24, strategy="autoregressive")
    expected = cached(decoder, plain)
    out = decoder.generate(prompt_of(7), 24)
    assert torch.equal(out.sequences, plain.sequences)
    assert same_bits(cached(decoder, out), expected)


class Logits:
    """A logits processor that keeps the last logits of every history: in a round, those of verification."""

    def __init__(self) -> None:
        self.seen = {}

    def __call__(self, history, logits):
        self.seen[tuple(history.tolist())] = logits.clone()
        return logits


@requires_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_logits_are_the_same_bits(dtype):
    decoder = SelfSpeculativeDecoder(tiny_model("qwen3", dtype, "weak"), exit_layer=1, num_speculations=5)
    plain, speculative = Logits(), Logits()
    out = decoder.generate(prompt_of(7), 24, strategy="autoregressive", logits_processor=plain)
    again = decoder.generate(prompt_of(7), 24, logits_processor=speculative)
    assert torch.equal(out.sequences, again.sequences)
    assert torch.equal(out.sequences, decoder.generate(prompt_of(7), 24).sequences)
    assert len(plain.seen) == 24 < len(speculative.seen)
    for history, logits in plain.seen.items():
        assert torch.equal(speculative.seen[history], logits)


@requires_native
@settings(max_examples=60, deadline=None)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    dtype=st.sampled_from(DTYPES),
    upper=st.sampled_from(sorted(UPPER)),
    exit_layer=st.integers(1, LAYERS - 1),
    count=st.integers(1, 8),
    length=st.integers(0, 20).map(lambda half: 2 * half + 1),
    new_tokens=st.integers(1, 40),
    stop=st.none() | st.integers(0, VOCABULARY - 1),
    head=st.sampled_from(("full", "int8", "subset")),
    seed=st.integers(0, 2**16),
)
def test_self_speculative_equals_autoregressive(
    architecture, dtype, upper, exit_layer, count, length, new_tokens, stop, head, seed
):
    draft_head = DraftHead(range(0, VOCABULARY, 2), VOCABULARY) if head == "subset" else head
    model = tiny_model(architecture, dtype, upper, seed)
    decoder = SelfSpeculativeDecoder(model, exit_layer, count, length + new_tokens, draft_head)
    prompt, stops = prompt_of(length, seed), [] if stop is None else stop
    plain = decoder.generate(prompt, new_tokens, strategy="autoregressive", eos_token_id=stops)
    out = decoder.generate(prompt, new_tokens, eos_token_id=stops)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.stats.new_tokens == 1 + out.stats.accepted + out.stats.rounds - cut_short(out)


def cut_short(out) -> int:
    """A round whose drafts hold the stop token ends there and does not emit the full model's own token."""
    return int(out.drafted[0, -1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_these_models_accept_and_reject_and_do_not_repeat_themselves(architecture):
    """Otherwise the tests above would test little."""
    rates, words = {}, []
    for upper in UPPER:
        stats = []
        for seed in range(4):
            decoder = SelfSpeculativeDecoder(tiny_model(architecture, upper=upper, seed=seed), 1, 3)
            out = decoder.generate(prompt_of(5, seed), 40)
            stats.append(out.stats)
            words.append(out.new_tokens.unique().numel())
        rates[upper] = sum(one.accepted for one in stats) / sum(one.drafted for one in stats)
    assert rates["random"] < 0.3 < rates["weak"] < 0.9 < rates["silent"] == 1.0
    assert sum(words) / len(words) > 6


@pytest.fixture
def decoder():
    """Some drafts are accepted, some are not."""
    return SelfSpeculativeDecoder(tiny_model(upper="weak"), exit_layer=1, num_speculations=4)


@pytest.mark.parametrize("new_tokens", range(1, 12))
def test_the_limit_falls_inside_a_round(new_tokens):
    decoder = SelfSpeculativeDecoder(tiny_model(upper="silent"), 1, 4, max_seq_len=5 + new_tokens)
    plain = decoder.generate(prompt_of(5), new_tokens, strategy="autoregressive")
    out = decoder.generate(prompt_of(5), new_tokens)
    assert out.new_tokens.shape == (1, new_tokens)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.stats.drafted == out.stats.accepted, "nothing is drafted that could not be emitted"


def test_the_cache_may_be_filled_to_the_last_position(decoder):
    limit = decoder.max_seq_len
    plain = decoder.generate(prompt_of(11), limit - 11, strategy="autoregressive")
    out = decoder.generate(prompt_of(11), limit - 11)
    assert out.sequences.shape == (1, limit)
    assert torch.equal(out.sequences, plain.sequences)


def test_a_stop_token_inside_a_draft_ends_the_sequence_there():
    decoder = SelfSpeculativeDecoder(tiny_model(upper="silent"), 1, 8)
    free = decoder.generate(prompt_of(5), 30).new_tokens[0].tolist()
    for index, stop in enumerate(free):
        expected = free[: free.index(stop) + 1]
        for eos in (stop, [stop], [free[-1], stop]) if index < 20 and free[-1] not in free[:20] else (stop,):
            out = decoder.generate(prompt_of(5), 30, eos_token_id=eos)
            assert out.new_tokens[0].tolist() == expected
            assert out.drafted.shape == out.new_tokens.shape
            assert int(out.drafted.sum()) == out.stats.accepted == sum(record.accepted for record in out.stats.records)


def test_the_default_stop_token_is_that_of_the_generation_config():
    model = tiny_model()
    free = SelfSpeculativeDecoder(model, 1).generate(prompt_of(5), 12).new_tokens[0].tolist()
    model.generation_config.eos_token_id = [free[6], VOCABULARY - 1]
    decoder = SelfSpeculativeDecoder(model, 1)
    assert decoder.generate(prompt_of(5), 12).new_tokens[0].tolist() == free[: free.index(free[6]) + 1]
    assert decoder.generate(prompt_of(5), 12, eos_token_id=[]).new_tokens[0].tolist() == free


def test_a_generation_config_without_a_stop_token_has_none():
    """As in transformers: the config's own token does not step in."""
    model = tiny_model()
    free = SelfSpeculativeDecoder(model, 1).generate(prompt_of(5), 12, eos_token_id=[]).new_tokens[0].tolist()
    model.config.eos_token_id = free[6]
    model.generation_config.eos_token_id = None
    assert SelfSpeculativeDecoder(model, 1).generate(prompt_of(5), 12).new_tokens[0].tolist() == free
    theirs = model.generate(prompt_of(5), max_new_tokens=12, do_sample=False)
    assert theirs[0, 5:].tolist() == free


def test_a_prompt_of_one_token(decoder):
    plain = decoder.generate(prompt_of(1), 20, strategy="autoregressive")
    assert torch.equal(decoder.generate(prompt_of(1), 20).sequences, plain.sequences)


@requires_native
def test_a_long_prompt_is_read_in_chunks(monkeypatch):
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 2)
    sizes = []
    forward = decoder.model.decoder.forward
    monkeypatch.setattr(
        decoder.model.decoder, "forward", lambda hidden, *args: sizes.append(hidden.shape[1]) or forward(hidden, *args)
    )
    monkeypatch.setattr("layerskip.decoding.scheduler.FUSED_ROWS", 32)
    plain = decoder.generate(prompt_of(101), 20, strategy="autoregressive")
    assert torch.equal(decoder.generate(prompt_of(101), 20).sequences, plain.sequences)
    assert sizes == [32, 32, 32, 5] * 2


def test_torch_reads_a_long_prompt_in_chunks(monkeypatch):
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 2)
    sizes = []
    prefill = decoder.model.decoder.prefill
    monkeypatch.setattr(
        decoder.model.decoder, "prefill", lambda hidden, *args: sizes.append(hidden.shape[1]) or prefill(hidden, *args)
    )
    monkeypatch.setattr("layerskip.decoding.scheduler.TORCH_ROWS", 32)
    fused = decoder.generate(prompt_of(101), 20, strategy="autoregressive")
    with use_backend("reference"):
        plain = decoder.generate(prompt_of(101), 20, strategy="autoregressive")
    assert torch.equal(fused.sequences, plain.sequences)
    if native_missing() is None:
        assert sizes == [32, 32, 32, 5]


def test_early_exit_is_the_shallow_model_alone():
    model = tiny_model()
    out = SelfSpeculativeDecoder(model, 2).generate(prompt_of(5), 20, strategy="early_exit")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    expected = SelfSpeculativeDecoder(model, 1).generate(prompt_of(5), 20, strategy="autoregressive")
    assert torch.equal(out.sequences, expected.sequences)
    assert out.stats.drafted == 0


def test_garbage_past_the_lengths_is_not_read(decoder):
    for strategy in ("autoregressive", "self_speculative", "early_exit"):
        clean = decoder.generate(prompt_of(9), 30, strategy=strategy)
        last_cache(decoder).k.fill_(float("nan"))
        last_cache(decoder).v.fill_(float("nan"))
        assert torch.equal(decoder.generate(prompt_of(9), 30, strategy=strategy).sequences, clean.sequences)


def test_the_cache_is_reused_and_grows(decoder):
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, max_seq_len=190)
    fresh = decoder.generate(prompt_of(150), 20)
    cache = last_cache(decoder)
    short = decoder.generate(prompt_of(3), 20)
    assert last_cache(decoder) is cache
    again = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1)
    assert torch.equal(again.generate(prompt_of(3), 20).sequences, short.sequences)
    assert torch.equal(again.generate(prompt_of(150), 20).sequences, fresh.sequences)


class Recorder:
    """A streamer that records its input, and can be made to fail."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.groups, self.ended, self.fail_after = [], 0, fail_after

    def put(self, value):
        if self.fail_after == len(self.groups):
            raise RuntimeError("cancelled")
        self.groups.append(value)

    def end(self):
        self.ended += 1


def test_a_cancelled_call_does_not_spoil_the_next(decoder):
    expected = decoder.generate(prompt_of(9), 30).sequences
    for fail_after in (0, 1, 2, 4):
        with pytest.raises(RuntimeError, match="cancelled"):
            decoder.generate(prompt_of(13, seed=1), 30, streamer=Recorder(fail_after))
        assert torch.equal(decoder.generate(prompt_of(9), 30).sequences, expected)


def test_the_streamer_gets_the_prompt_then_accepted_tokens_only(decoder):
    recorder = Recorder()
    out = decoder.generate(prompt_of(9), 30, streamer=recorder)
    prompt, first, *rounds = recorder.groups
    assert torch.equal(prompt, prompt_of(9))
    assert first.shape == (1,)
    assert [len(group) for group in rounds] == [record.accepted + 1 for record in out.stats.records]
    assert torch.equal(torch.cat([first, *rounds]), out.new_tokens[0])
    assert recorder.ended == 1


def test_the_text_streamer_of_transformers_works(decoder, capsys):
    from transformers import TextStreamer

    class Numbers:
        def decode(self, tokens, **options):
            return "".join(f"{token} " for token in tokens)

    out = decoder.generate(prompt_of(4), 12, streamer=TextStreamer(Numbers(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [str(token) for token in out.new_tokens[0].tolist()]


def test_stats_add_up(decoder):
    out = decoder.generate(prompt_of(9), 30)
    stats = out.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (9, 30)
    assert stats.new_tokens == 1 + stats.rounds + stats.accepted
    assert stats.acceptance_rate == stats.accepted / stats.drafted
    assert 0 < stats.time_to_first_token < stats.seconds
    assert stats.tokens_per_second == 30 / stats.seconds
    assert stats.decode_tokens_per_second == 29 / (stats.seconds - stats.time_to_first_token)
    assert int(out.drafted.sum()) == stats.accepted
    assert out.sequences.dtype == torch.int64
    assert not out.sequences.is_inference()
    plain = decoder.generate(prompt_of(9), 30, strategy="autoregressive").stats
    assert (plain.rounds, plain.drafted, plain.acceptance_rate) == (29, 0, 0.0)


@requires_native
def test_a_round_synchronizes_once(decoder, monkeypatch):
    calls = []
    for name in ("tolist", "item", "__int__", "__bool__", "__index__", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *args, _name=name, _call=original: calls.append(_name) or _call(self, *args),
        )
    counts = []

    def counted(self, *args, _run=Batch.run):
        before = len(calls)
        result = _run(self, *args)
        counts.append(calls[before:])
        return result

    monkeypatch.setattr(Batch, "run", counted)
    assert decoder.generate(prompt_of(9), 30).stats.rounds > 3
    assert all(count == ["tolist"] for count in counts)
    alone = len(counts)
    decoder.generate([prompt_of(9)[0], prompt_of(4)[0]], 30)
    assert len(counts) > alone + 3
    assert all(count == ["tolist"] for count in counts)


def test_the_decoders_threshold_is_the_default_of_its_calls_and_sessions():
    model = tiny_model(upper="weak")
    plain, careful = SelfSpeculativeDecoder(model, 1), SelfSpeculativeDecoder(model, 1, draft_threshold=1.0)
    drafted = plain.generate(prompt_of(5), 20).stats.drafted
    assert drafted > 0
    assert plain.generate(prompt_of(5), 20, draft_threshold=1.0).stats.drafted == 0
    assert careful.generate(prompt_of(5), 20).stats.drafted == 0
    assert careful.generate(prompt_of(5), 20, draft_threshold=0.0).stats.drafted == drafted
    session = careful.open_session(1)
    session.add(prompt_of(5), 20)
    outputs = [update.output for _ in range(20) for update in session.step()]
    assert outputs[-1].stats.drafted == 0


def test_the_weights_are_not_copied():
    model = tiny_model()
    decoder = SelfSpeculativeDecoder(model, 1)
    owned = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in decoder.model.parameters()} == owned
    assert decoder.draft_head is decoder.model.head


@requires_native
def test_no_limit_decodes_to_the_end_of_the_context():
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1, 4, max_seq_len=40)
    decoder.tokenizer = byte_level()
    prompts = [prompt_of(5)[0].tolist(), prompt_of(12, 1)[0].tolist()]
    alone = [decoder.generate(one, 40 - len(one), eos_token_id=[]).new_tokens[0].tolist() for one in prompts]
    batch = decoder.generate(prompts, None, eos_token_id=[])
    assert batch.reasons == ("length", "length")
    assert [row.new_tokens for row in batch.per_sequence] == [35, 28]
    for tokens, row, expected in zip(batch.new_tokens.tolist(), batch.per_sequence, alone, strict=True):
        assert tokens[: row.new_tokens] == expected
    text = decoder.generate(prompts[0], 35, eos_token_id=[]).text
    assert "".join(decoder.stream(prompts[0], None, eos_token_id=[])) == text
    chat = Conversation(decoder)
    chat.generate(prompts[0], 6, eos_token_id=[])
    assert len(chat.generate([3], None, eos_token_id=[]).sequences[0]) == len(chat.tokens) == 40
    session = decoder.open_session(1, max_seq_len=20)
    session.add(prompts[1], None, eos_token_id=[])
    assert [token for update in session.run() for token in update.tokens] == alone[1][:8]


def test_no_limit_ends_at_eos():
    decoder = SelfSpeculativeDecoder(tiny_model(upper="weak"), 1)
    tokens = decoder.generate(prompt_of(5), 10, eos_token_id=[]).new_tokens[0].tolist()
    out = decoder.generate(prompt_of(5), None, eos_token_id=tokens[6])
    assert out.reasons == ("eos",)
    assert out.new_tokens[0].tolist() == tokens[: tokens.index(tokens[6]) + 1]


def test_a_prompt_that_fills_the_context_leaves_no_room():
    decoder = SelfSpeculativeDecoder(tiny_model(), 1, max_seq_len=12)
    full = prompt_of(12)
    for take in (decoder.generate, decoder.open_session(1).add, Conversation(decoder).generate):
        with pytest.raises(ValueError, match="a prompt of 12 tokens leaves no room for new ones in max_seq_len=12"):
            take(full, None)
    assert decoder.generate(full[:, 1:], None, eos_token_id=[]).reasons == ("length",)
