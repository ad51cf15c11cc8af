"""A real model and its tokenizer, through every way into transformers."""

import pytest
import torch
import transformers
from tiny import requires_native

import layerskip
from layerskip.models import load
from tests.example_package import requires_weights

pytestmark = [requires_native, requires_weights, pytest.mark.slow, pytest.mark.time_limit(7200)]
OURS = {"custom_generate": layerskip.generate, "exit_layer": 24, "num_speculations": 2}
NEW = {"max_new_tokens": 16, "do_sample": False}
CHAT = [{"role": "user", "content": "Name three colours, one a line. Then say 你好 and 😀."}]


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2", dtype=torch.float32)


def test_a_chat_streams_and_an_accelerated_model_says_the_same(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    plain = model.generate(**inputs, **NEW)
    stream = layerskip.TextStream(tokenizer)
    assert torch.equal(model.generate(**inputs, **NEW, **OURS, streamer=stream), plain)
    pieces = list(stream)
    text = tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(pieces) == text
    assert all(piece.isprintable() or "\n" in piece for piece in pieces)
    decoder = layerskip.SelfSpeculativeDecoder(model, 24, 2)
    assert "".join(decoder.stream(inputs["input_ids"], 16, tokenizer=tokenizer)) == text
    layerskip.accelerate(model)
    try:
        assert torch.equal(model.generate(**inputs, **NEW), plain)
    finally:
        layerskip.restore(model)


def test_a_padded_batch_with_stop_strings(smollm2):
    model, tokenizer = smollm2
    tokenizer.padding_side = "left"
    texts = ["The capital of France is", "Once upon a time, in a small village by the sea, there"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    options = {**NEW, "stop_strings": [" wise", ".\n"], "tokenizer": tokenizer, "repetition_penalty": 1.1}
    plain = model.generate(**inputs, **options)
    assert plain.shape[1] < inputs["input_ids"].shape[1] + 16
    assert torch.equal(model.generate(**inputs, **options, **OURS), plain)


def test_a_pipeline(smollm2):
    model, tokenizer = smollm2
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert pipe(CHAT, **NEW, **OURS) == pipe(CHAT, **NEW)
