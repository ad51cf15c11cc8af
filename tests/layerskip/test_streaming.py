"""Text while it is generated, through transformers' streamer protocol and the decoder's own iterator."""

import queue
from threading import Thread

import pytest
import torch
from tiny import prompt_of, tiny_model
from tokenizers_of import KINDS

from layerskip import SelfSpeculativeDecoder, TextStream

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


def test_transformers_puts_the_same(tokenizer, model, decoder):
    stream, prompt = TextStream(tokenizer), prompt_of(7)
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, streamer=stream)
    assert "".join(stream) == expected(tokenizer, decoder, prompt)


def test_another_thread_reads_meanwhile(tokenizer, decoder):
    stream, prompt = TextStream(tokenizer, timeout=60), prompt_of(7)
    options = {"max_new_tokens": NEW, "streamer": stream, "eos_token_id": []}
    thread = Thread(target=decoder.generate, args=(prompt,), kwargs=options)
    thread.start()
    pieces = list(stream)
    thread.join()
    assert len(pieces) > 3
    assert "".join(pieces) == expected(tokenizer, decoder, prompt)


def test_a_stream_serves_again(tokenizer, decoder):
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


def test_nobody_waits_forever(tokenizer):
    stream = TextStream(tokenizer, timeout=0.01)
    with pytest.raises(queue.Empty):
        next(stream)


def test_a_batch_is_refused(tokenizer):
    with pytest.raises(ValueError, match="one sequence, got 2"):
        TextStream(tokenizer).put(torch.zeros(2, 3, dtype=torch.int64))
