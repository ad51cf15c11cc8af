"""Text while it is generated, through transformers' streamer protocol and the decoder's own iterator."""

import queue
from threading import Thread

import pytest
import torch
from tiny import prompt_of, tiny_model
from tokenizers_of import KINDS

from layerskip import SelfSpeculativeDecoder, Session, StopStrings, TextStream

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 24


@pytest.fixture(scope="module")
def tokenizer():
    return KINDS["byte_level"]()


@pytest.fixture(scope="module")
def model():
    """Random, with some drafts that hold; its tokens are single characters and two special ones."""
    return tiny_model(upper="weak")


@pytest.fixture(scope="module")
def decoder(model):
    return SelfSpeculativeDecoder(model, 2, 4)


def text_of(tokenizer, tokens, **options):
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False, **options}
    return tokenizer.decode(torch.as_tensor(tokens).reshape(-1), **options)


def expected(tokenizer, decoder, prompt):
    """The text of the new tokens, as the continuation of the prompt."""
    out = decoder.generate(prompt, NEW, eos_token_id=[])
    return text_of(tokenizer, out.sequences)[len(text_of(tokenizer, prompt)) :]


@pytest.mark.parametrize("skip_prompt", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_stream_reads_what_the_decoder_puts(tokenizer, decoder, seed, skip_prompt):
    stream, prompt = TextStream(tokenizer, skip_prompt=skip_prompt), prompt_of(7, seed)
    out = decoder.generate(prompt, NEW, streamer=stream, eos_token_id=[])
    assert out.stats.rounds < NEW - 1, "without drafts that hold this tests little"
    before = "" if skip_prompt else text_of(tokenizer, prompt)
    assert "".join(stream) == before + expected(tokenizer, decoder, prompt)


def test_transformers_streamers_get_the_same(tokenizer, model, decoder):
    stream, prompt = TextStream(tokenizer), prompt_of(7)
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, streamer=stream)
    assert "".join(stream) == expected(tokenizer, decoder, prompt)


def test_another_thread_can_read(tokenizer, decoder):
    stream, prompt = TextStream(tokenizer, timeout=60), prompt_of(7)
    options = {"max_new_tokens": NEW, "streamer": stream, "eos_token_id": []}
    thread = Thread(target=decoder.generate, args=(prompt,), kwargs=options)
    thread.start()
    pieces = list(stream)
    thread.join()
    assert len(pieces) > 3
    assert "".join(pieces) == expected(tokenizer, decoder, prompt)


def test_a_stream_can_be_reused(tokenizer, decoder):
    stream = TextStream(tokenizer)
    for seed in (1, 2):
        decoder.generate(prompt_of(5, seed), NEW, streamer=stream, eos_token_id=[])
        assert "".join(stream) == expected(tokenizer, decoder, prompt_of(5, seed))


def test_a_stream_ends_at_a_stop_string(tokenizer, decoder):
    prompt = prompt_of(7)
    text = expected(tokenizer, decoder, prompt)
    stop = text[9:12]
    for include in (False, True):
        stream = TextStream(tokenizer, stop, include_stop_string=include)
        stream.put(prompt)
        for token in decoder.generate(prompt, NEW, eos_token_id=[]).new_tokens[0]:
            stream.put(token[None])
        assert stream.stopped
        stream.end()
        cut = text.index(stop) + include * len(stop)
        assert "".join(stream) == text[:cut]


def test_the_timeout_raises_empty(tokenizer):
    stream = TextStream(tokenizer, timeout=0.01)
    with pytest.raises(queue.Empty):
        next(stream)


def test_a_batch_is_refused(tokenizer):
    with pytest.raises(ValueError, match="one sequence, got 2"):
        TextStream(tokenizer).put(torch.zeros(2, 3, dtype=torch.int64))


# The decoder's own iterator


def test_the_iterator_gives_the_text(tokenizer, decoder):
    prompt = prompt_of(7)
    for kind in (prompt, prompt[0], prompt[0].tolist()):
        pieces = list(decoder.stream(kind, NEW, tokenizer=tokenizer, eos_token_id=[]))
        assert len(pieces) > 3
        assert "".join(pieces) == expected(tokenizer, decoder, prompt)


def test_a_string_is_a_prompt(tokenizer, decoder, monkeypatch):
    monkeypatch.setattr(decoder, "tokenizer", tokenizer)
    ids = torch.tensor([tokenizer("QED").input_ids])
    assert ids.max() < 101
    assert "".join(decoder.stream("QED", NEW, eos_token_id=[])) == expected(tokenizer, decoder, ids)


@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive"])
@pytest.mark.parametrize("seed", range(2))
def test_every_stop_string_of_a_text(tokenizer, decoder, strategy, seed):
    """Wherever in a round the token that completes it is."""
    prompt = prompt_of(7, seed)
    out = decoder.generate(prompt, NEW, eos_token_id=[])
    text = expected(tokenizer, decoder, prompt)
    for start in range(0, len(text) - 2, 2):
        stop = text[start : start + 2]
        options = {"tokenizer": tokenizer, "eos_token_id": [], "strategy": strategy}
        assert "".join(decoder.stream(prompt, NEW, stop_strings=stop, **options)) == text[: text.index(stop)]
        kept = "".join(decoder.stream(prompt, NEW, stop_strings=stop, include_stop_string=True, **options))
        assert kept == text[: text.index(stop) + 2]
        rule = StopStrings(tokenizer, stop, prompt[0].tolist())
        cut = decoder.generate(prompt, NEW, strategy=strategy, eos_token_id=[], should_stop=rule).new_tokens[0].tolist()
        assert cut == out.new_tokens[0, : len(cut)].tolist()
        assert stop in text_of(tokenizer, cut)
        assert stop not in text_of(tokenizer, cut[:-1])


def test_stop_strings_of_a_batch(tokenizer, decoder, monkeypatch):
    monkeypatch.setattr(decoder, "tokenizer", tokenizer)
    prompts = [prompt_of(length, length)[0].tolist() for length in (7, 3, 5)]
    plain = [decoder.generate([prompt], NEW, eos_token_id=[]).new_tokens[0].tolist() for prompt in prompts]
    stops = [text_of(tokenizer, tokens)[8:10] for tokens in plain]
    out = decoder.generate(prompts, NEW, eos_token_id=[], stop_strings=stops)
    for tokens, row in zip(out.new_tokens.tolist(), out.per_sequence, strict=True):
        text = text_of(tokenizer, tokens[: row.new_tokens])
        assert any(stop in text for stop in stops)
        assert not any(stop in text_of(tokenizer, tokens[: row.new_tokens - 1]) for stop in stops)
    assert out.reasons == ("stop",) * 3
    third = decoder.generate(
        prompts, NEW, eos_token_id=[], stop_strings="~~~", should_stop=lambda tokens: len(tokens) > 2
    )
    assert third.new_tokens.shape == (3, 3)


def test_stop_strings_need_a_tokenizer(decoder):
    with pytest.raises(ValueError, match=r"set decoder\.tokenizer"):
        decoder.generate(prompt_of(3), stop_strings="x")
    assert decoder.generate(prompt_of(3), 4, stop_strings=[]).reasons == ("length",)


@pytest.mark.parametrize("strings", ["", [""], ("x", "")])
def test_an_empty_stop_string_is_refused_everywhere(tokenizer, decoder, strings):
    for take in (
        lambda: decoder.generate(prompt_of(3), 4, tokenizer=tokenizer, stop_strings=strings),
        lambda: decoder.stream(prompt_of(3), 4, tokenizer=tokenizer, stop_strings=strings),
        lambda: StopStrings(tokenizer, strings),
        lambda: TextStream(tokenizer, strings),
    ):
        with pytest.raises(ValueError, match="stop_strings must not hold an empty string"):
            take()


def test_eos_is_text_only_where_special_tokens_are(tokenizer, decoder):
    prompt = prompt_of(7)
    tokens = decoder.generate(prompt, NEW, eos_token_id=[]).new_tokens[0].tolist()
    end = tokens[5]
    cut = tokens[: tokens.index(end) + 1]
    pieces = decoder.stream(prompt, NEW, tokenizer=tokenizer, eos_token_id=end)
    assert "".join(pieces) == text_of(tokenizer, cut)


def test_leaving_the_loop_ends_the_generation(tokenizer, decoder, monkeypatch):
    steps = []
    step = Session.step
    monkeypatch.setattr(Session, "step", lambda session: steps.append(1) or step(session))
    for _ in decoder.stream(prompt_of(7), 200, tokenizer=tokenizer, eos_token_id=[]):
        break
    assert len(steps) < 4


def test_errors_come_before_the_first_piece(tokenizer, decoder):
    with pytest.raises(ValueError, match="tokenizer must be given"):
        decoder.stream("text")
    with pytest.raises(ValueError, match="stop_strings must"):
        decoder.stream(prompt_of(3), tokenizer=tokenizer, stop_strings=[""])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        decoder.stream(prompt_of(3), 0, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="max_seq_len=256"):
        decoder.stream(prompt_of(3), 1000, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="exit_layer"):
        decoder.stream(prompt_of(3), tokenizer=tokenizer, exit_layer=9)
